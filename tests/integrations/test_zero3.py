"""Models that DeepSpeed's ZeRO-3 partitions in a loop of one's own, on two processes."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.processes import run_ranks
from support.zero3_corners import routed, step, values

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: .ci/sharded"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("zero3")
    run_ranks("zero3_corners.py", made, environment={"DS_ACCELERATOR": "cpu"}, seconds=300)
    return made


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_a_routed_step_of_registered_blocks_is_that_of_one_process(ranks: list[dict[str, Any]]) -> None:
    before, expected = values(routed()), step(slice(None))
    for name, value in expected.items():
        change = value - before[name]
        assert change.norm() > 0
        for found in ranks:
            assert float((found["step"][name] - value).norm() / change.norm()) < 5e-6, name


@pytest.mark.corner(
    "under ZeRO-3 a loop never calls `refresher.step()`, and DeepSpeed's optimizer cannot be watched",
    "the next score raises: the shares of the deployed blocks change, which torch does not count",
)
def test_a_refresher_that_is_not_called_is_found(ranks: list[dict[str, Any]]) -> None:
    assert all("should be called once after each optimizer step" in found["unwatched"] for found in ranks)


@pytest.mark.corner(
    "modules that PEFT trains whole (`modules_to_save`) are exported under ZeRO-3",
    "gathered: what a state dict holds of a partitioned parameter is empty",
)
def test_modules_that_are_trained_whole_are_exported_whole(folder: Path, ranks: list[dict[str, Any]]) -> None:
    exported = load_file(folder / "modules" / "adapter_model.safetensors")
    (found,) = (tensor for name, tensor in exported.items() if "lora" not in name)
    assert torch.equal(found, ranks[0]["modules"])


def test_a_partitioned_layer_is_not_merged(ranks: list[dict[str, Any]]) -> None:
    assert all("is sharded, and its base weight could not be put back" in found["merge"] for found in ranks)


def test_the_weights_that_gains_decompose_are_gathered(ranks: list[dict[str, Any]]) -> None:
    assert all(sorted(found["gains"]) == [(2,), (2, 16), (16, 2)] for found in ranks)
