"""Weights that accelerate offloads: evaluated as in memory, or refused, and never computed with as they lie (meta)."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import get_peft_model
from support.models import randomize_blocks
from support.peft_cases import Case, unnamed_base
from support.tiny_models import base_model, config
from torch import Tensor, nn

import gradroute as gr
from gradroute._hashing import deployed_hash, model_identity

pytestmark = [unnamed_base, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")]
IDS = torch.arange(1, 17).reshape(2, 8)


def attached() -> nn.Module:
    return randomize_blocks(gr.attach(base_model("llama"), r=3, r_quarantine=4, lora_alpha=6), std=0.2).eval()


def offloaded(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def views(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        on = model(IDS).logits
        with gr.ablate_quarantine(model):
            return [on, model(IDS).logits]


both = pytest.mark.parametrize("make", [Case("llama").model, attached], ids=["PEFT", "attached"])


@pytest.mark.corner("an adapted model is offloaded and evaluated", "both views are exact: weights are fetched")
@both
def test_an_offloaded_model_shows_both_views(make: Callable[[], nn.Module]) -> None:
    model = make()
    on, ablated = views(model)
    assert not torch.allclose(on, ablated)
    for found, expected in zip(views(offloaded(model)), (on, ablated), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.corner("offloaded blocks are trained", "`RouteError`")
@both
def test_offloaded_blocks_cannot_be_trained(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(gr.errors.RouteError, match="offloads cannot be trained.*Fix"):
        offloaded(make())(IDS)


@both
def test_the_base_models_identity_is_that_of_the_weights_in_memory(make: Callable[[], nn.Module]) -> None:
    model = make()
    assert model_identity(offloaded(model)) == model_identity(model)


def test_offloaded_blocks_of_peft_are_exported_and_merged(tmp_path: Path) -> None:
    model = Case("llama").model()
    assert deployed_hash(offloaded(model)) == deployed_hash(model)
    for name, each in {"in memory": model, "offloaded": offloaded(model)}.items():
        gr.export_full(each, tmp_path / name)
    first, second = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("in memory", "offloaded")
    )
    assert first == second
    expected = views(model)[1]
    torch.testing.assert_close(gr.merge_deployed(offloaded(model))(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_attached_ones_are_refused_until_they_are_back_in_memory(tmp_path: Path) -> None:
    model = attached()
    away = offloaded(model)
    for call in (deployed_hash, gr.merge_deployed, lambda m: gr.export_deployed(m, tmp_path)):
        with pytest.raises(gr.GradRouteError, match="should be in memory.*Fix.*remove_hook_from_submodules"):
            call(away)
    remove_hook_from_submodules(away)
    assert deployed_hash(away) == deployed_hash(model)


def on_disk(folder: Path) -> nn.Module:
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return dispatch_model(
        base_model("llama"),
        {**places, "model.layers.1": "disk"},
        main_device="cpu",
        offload_dir=folder,
        force_hooks=True,
    )


@pytest.mark.parametrize("away", [lambda _: offloaded(base_model("llama")), on_disk], ids=["CPU", "disk"])
def test_no_new_blocks_are_put_around_offloaded_layers(away: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    Case("llama").model().save_pretrained(tmp_path / "checkpoint")
    calls = [
        lambda model: gr.attach(model, r=2, target_modules=r"model\.layers\.1\..*_proj"),
        lambda model: get_peft_model(model, config()),
        lambda model: gr.load_quarantined(model, tmp_path / "checkpoint"),
    ]
    for i, call in enumerate(calls):
        (tmp_path / str(i)).mkdir()
        with pytest.raises(gr.errors.TargetError, match="offloaded.*Fix: adapt the model first"):
            call(away(tmp_path / str(i)))


def test_a_second_adapter_is_refused_too() -> None:
    model = offloaded(Case("llama").model())
    with pytest.raises(gr.errors.TargetError, match="offloaded"):
        model.add_adapter("second", config())


def test_blocks_left_on_meta_by_an_injection_do_not_run() -> None:
    model = get_peft_model(base_model("llama"), config(), low_cpu_mem_usage=True).eval()
    with torch.no_grad(), pytest.raises(gr.errors.RouteError, match="blocks with values.*meta.*Fix"):
        model(IDS)


@pytest.mark.corner("`load_quarantined` onto a base with a layer on disk or on meta", "an error with the reason")
def test_a_base_model_without_values_takes_no_checkpoint(tmp_path: Path) -> None:
    Case("llama").model().save_pretrained(tmp_path)
    with pytest.raises(gr.errors.TargetError, match="no values.*Fix: load the base model"):
        gr.load_quarantined(base_model("llama").to("meta"), tmp_path)


@both
def test_check_model_names_offloaded_blocks(make: Callable[[], nn.Module]) -> None:
    reasons = [finding.reason for finding in gr.check_model(offloaded(make()))]
    assert any("deployed block is on the meta device" in reason for reason in reasons)
    assert any("quarantine block is on the meta device" in reason for reason in reasons)


def test_check_model_names_an_offloaded_base_model_once() -> None:
    (finding,) = gr.check_model(offloaded(base_model("llama")))
    assert (finding.module, finding.severity) == ("model.embed_tokens", "warning")
    assert "offloaded by accelerate" in finding.reason
    (finding,) = gr.check_model(base_model("llama").to("meta"))
    assert finding.severity == "error"
    assert "load the model first" in finding.reason


def test_a_base_without_values_has_no_identity() -> None:
    with pytest.raises(gr.GradRouteError, match="should have values. Found it on the meta device.*Fix: load"):
        model_identity(base_model("llama").to("meta"))
