"""`Directions` in files: everything comes back, and what is no such file, or another model's, is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.language_models import MODULES, extracted, routed_mixer

import gradroute as gr
from gradroute.directions import summary


def test_a_file_brings_everything_back(tmp_path: Path) -> None:
    saved = extracted().random_like(seed=4)
    saved.update_(extracted(), step=11)
    saved.save(tmp_path / "hack.safetensors")
    loaded = gr.Directions.load(str(tmp_path / "hack.safetensors"), model=routed_mixer())
    assert list(loaded.rows) == list(saved.rows) == MODULES
    for name in MODULES:
        for theirs, mine in ((loaded.rows, saved.rows), (loaded.hack, saved.hack), (loaded.clean, saved.clean)):
            assert torch.equal(theirs[name], mine[name])
            assert theirs[name].dtype == mine[name].dtype == torch.float64
    assert loaded.provenance == saved.provenance
    assert (loaded.version, loaded.step) == (1, 11)
    assert repr(loaded) == repr(saved)


def test_standardised_scores_survive_a_file(tmp_path: Path) -> None:
    made = extracted(estimator="ridge(n_heldout=1)")
    made.save(tmp_path / "hack.safetensors")
    loaded = gr.Directions.load(tmp_path / "hack.safetensors")
    assert loaded.heldout == made.heldout != ()
    assert all(torch.equal(score, own) for score, own in zip(loaded.pair_scores(), made.pair_scores(), strict=True))
    assert str(summary(loaded)) == str(summary(made))


def test_loaded_directions_can_be_refreshed(tmp_path: Path) -> None:
    extracted().save(tmp_path / "hack.safetensors")
    loaded = gr.Directions.load(tmp_path / "hack.safetensors")
    loaded.update_(extracted(), step=5)
    assert (loaded.version, loaded.step) == (1, 5)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_raises(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "hack.safetensors"
    extracted().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(gr.errors.FileFormatError, match=r"hack\.safetensors.*truncated"):
        gr.Directions.load(path)


def test_a_file_that_lacks_a_tensor_raises(tmp_path: Path) -> None:
    path = tmp_path / "hack.safetensors"
    extracted().save(path)
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(str(path))
    del tensors["clean/out"]
    save_file(tensors, str(path), metadata=metadata)
    with pytest.raises(gr.errors.FileFormatError, match=r"hack\.safetensors.*clean/out"):
        gr.Directions.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"gradroute": '{"format": "gradroute-directions-1"}'}])
def test_other_safetensors_files_raise(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({"lora_A": torch.zeros(2)}, str(path), metadata=metadata)
    with pytest.raises(
        gr.errors.FileFormatError, match=r"adapter_model.*expected the format gradroute-directions-2. Found"
    ):
        gr.Directions.load(path)


def test_a_file_of_another_format_raises(tmp_path: Path) -> None:
    torch.save({"rows": torch.zeros(2)}, tmp_path / "hack.pt")
    with pytest.raises(gr.errors.FileFormatError, match=r"hack\.pt"):
        gr.Directions.load(tmp_path / "hack.pt")


def test_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`path` should be .*none\.safetensors"):
        gr.Directions.load(tmp_path / "none.safetensors")


def test_directions_of_another_model_raise(tmp_path: Path) -> None:
    extracted().save(tmp_path / "hack.safetensors")
    assert gr.Directions.load(tmp_path / "hack.safetensors", model=routed_mixer()).n_pairs == 4
    with pytest.raises(gr.errors.FileFormatError, match=r"hack\.safetensors.*another base model than `model`"):
        gr.Directions.load(tmp_path / "hack.safetensors", model=routed_mixer(seed=1))
