"""Exports with a part of the quarantine: stock PEFT shows the view that the scale names, and scale 0 is as it was."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.models import randomize_blocks
from support.peft_cases import Case, distance, logits, unnamed_base

import gradroute as gr

pytestmark = [pytest.mark.touches_peft, unnamed_base]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CASES = {
    "llama": Case("llama", torch.float64),
    "GPT-2": Case("gpt2", torch.float64),
    "patterns and rsLoRA": Case(
        "llama", torch.float64, {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 15}, "use_rslora": True}
    ),
}


@pytest.mark.parametrize("scale", [0.0, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_stock_peft_gives_the_logits_of_the_view(name: str, scale: float, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.model()
    gr.export_deployed(model, tmp_path, scale=scale)
    with gr.ablate_quarantine(model, scale):
        expected = logits(model)
    for other in {0.0, 0.25, 0.7, 1.0} - {scale}:
        with gr.ablate_quarantine(model, other):
            assert distance(logits(model), expected) > 1e-3
    stock = PeftModel.from_pretrained(case.base(), tmp_path, autocast_adapter_dtype=False).eval()
    assert distance(logits(stock), expected) < 1e-12


def test_attached_gains_are_scaled_too(tmp_path: Path) -> None:
    """Their blocks are read from the singular vectors of the frozen weight."""
    base = CASES["llama"].base
    model = gr.attach(base(), r=3, r_quarantine=4, lora_alpha=6, parametrization="svd_gain")
    model = randomize_blocks(model, std=2.0).eval()
    gr.export_deployed(model, tmp_path, scale=0.3)
    with gr.ablate_quarantine(model, 0.3):
        expected = logits(model)
    assert distance(logits(model), expected) > 1e-3
    stock = PeftModel.from_pretrained(base(), tmp_path, autocast_adapter_dtype=False).eval()
    assert distance(logits(stock), expected) < 1e-10


def test_both_ends_are_the_files_that_other_calls_write(tmp_path: Path) -> None:
    model = CASES["patterns and rsLoRA"].model()
    gr.export_deployed(model, tmp_path / "deployed")
    gr.export_full(model, tmp_path / "full")
    for scale, same in {0.0: "deployed", 1: "full"}.items():
        gr.export_deployed(model, tmp_path / "scaled", scale=scale)
        for file in (WEIGHTS, CONFIG):
            assert (tmp_path / "scaled" / file).read_bytes() == (tmp_path / same / file).read_bytes()
    assert (tmp_path / "deployed" / WEIGHTS).read_bytes() != (tmp_path / "full" / WEIGHTS).read_bytes()


def test_the_scale_is_in_the_quarantines_B_alone(tmp_path: Path) -> None:
    model = CASES["llama"].model()
    gr.export_deployed(model, tmp_path / "quarter", scale=0.25)
    gr.export_full(model, tmp_path / "full")
    quarter, full = (load_file(tmp_path / name / WEIGHTS) for name in ("quarter", "full"))
    for name, matrix in full.items():
        if "lora_A" in name:
            assert torch.equal(quarter[name], matrix)
        else:
            assert torch.equal(quarter[name][:, :3], matrix[:, :3])
            assert torch.allclose(quarter[name][:, 3:], 0.25 * matrix[:, 3:], rtol=1e-15)
            assert matrix[:, 3:].any()


@pytest.mark.parametrize("scale", [-0.1, 1.5, float("nan"), True])
def test_a_scale_out_of_range_raises_before_anything_is_written(scale: float, tmp_path: Path) -> None:
    with pytest.raises(gr.GradRouteError, match=r"`scale` should be a share in \[0, 1\]. Found"):
        gr.export_deployed(CASES["llama"].model(), tmp_path / "nothing", scale=scale)
    assert not (tmp_path / "nothing").exists()


def test_a_broken_quarantine_is_exported_at_no_scale_but_zero(tmp_path: Path) -> None:
    model = CASES["llama"].model()
    with torch.no_grad():
        next(iter(gr.quarantine_parameters(model)))[1][0, 0] = float("nan")
    gr.export_deployed(model, tmp_path / "deployed")
    with pytest.raises(gr.GradRouteError, match="should be finite"):
        gr.export_deployed(model, tmp_path / "scaled", scale=0.1)
    assert not (tmp_path / "scaled").exists()
