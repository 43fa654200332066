"""An export that stock PEFT would load as something else is refused, before a file is written."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.models import Tower, randomize_blocks
from support.peft_cases import Case, assert_near, unnamed_base
from support.tiny_models import config, llama, moe_with_dense_layers
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

import gradroute as gr
from gradroute.adapters.peft import _reload

pytestmark = [pytest.mark.touches_peft, unnamed_base]
EXPORTS = [gr.export_deployed, gr.export_full]
IDS = torch.arange(1, 17).reshape(2, 8)


def ablated(model: nn.Module) -> torch.Tensor:
    with gr.ablate_quarantine(model), torch.no_grad():
        return model(IDS).logits


@pytest.mark.corner(
    "an export that stock PEFT would load as something else (dense layers next to packed experts)",
    "refused before a file is written; `merge_deployed` is right",
)
@pytest.mark.parametrize("kind", ["qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("export", EXPORTS)
def test_dense_layers_next_to_packed_experts_are_refused_and_merging_is_right(
    kind: str, export: Callable[..., None], tmp_path: Path
) -> None:
    model = randomize_blocks(gr.attach(moe_with_dense_layers(kind), r=3, lora_alpha=6), std=0.2).eval()
    with pytest.raises(gr.GradRouteError, match=r"lose the LoRA of .*mlp\..*packed experts.*Fix: merge_deployed"):
        export(model, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    expected = ablated(model)
    torch.testing.assert_close(gr.merge_deployed(model)(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_attention_next_to_packed_experts_is_exported(tmp_path: Path) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    attached = gr.attach(moe_with_dense_layers("glm4_moe"), r=3, lora_alpha=6, target_modules=targets)
    model = randomize_blocks(attached, std=0.2).eval()
    gr.export_deployed(model, tmp_path)
    loaded = PeftModel.from_pretrained(moe_with_dense_layers("glm4_moe"), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, ablated(model), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:PEFT refuses:gradroute.GradRouteWarning")
def test_what_peft_refuses_to_load_is_refused_with_its_reason(tmp_path: Path) -> None:
    base = MambaForCausalLM(MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=32))
    model = gr.attach(base, r=2, target_modules=["out_proj"])
    with pytest.raises(gr.GradRouteError, match=r"refuses: .*out_proj.*Fix: merge_deployed"):
        gr.export_deployed(model, tmp_path)


@pytest.mark.parametrize("wrong", ["value", "lost", "added"])
def test_a_file_that_peft_loads_as_other_layers_or_values_is_refused(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a PEFT would that rewrites names or scales while it loads."""
    load = _reload._loaded

    def loaded(*arguments: Any) -> dict[str, Any]:
        found = load(*arguments)
        name, (A, B) = next(iter(found.items()))
        return {"value": {**found, name: (A, 2 * B)}, "lost": {**found, name: None}, "added": {**found, "x": (A, B)}}[
            wrong
        ]

    monkeypatch.setattr(_reload, "_loaded", loaded)
    model = randomize_blocks(gr.attach(llama(), r=2))
    counts = "0 of .* adapt 1 others" if wrong == "added" else "1 of .* adapt 0 others"
    with pytest.raises(gr.GradRouteError, match=f"lose the LoRA of {counts}"):
        gr.export_deployed(model, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def marks(model: nn.Module) -> dict[str, Any]:
    """What loading onto a twin could have changed in a model."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            list(module._modules),
            module.training,
            len(module._forward_hooks),
        )
        for name, module in model.named_modules()
    } | {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("make", [Case("llama").model, lambda: gr.attach(llama(), r=2)], ids=["PEFT", "attached"])
def test_the_check_changes_nothing_in_the_model(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    model.register_forward_hook(lambda *_: None)
    next(iter(model.parameters())).requires_grad_()
    before, state = marks(model), torch.get_rng_state()
    for export in EXPORTS:
        export(model, tmp_path)
    assert marks(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_compiled_one_by_one_are_exported_under_their_plain_names(tmp_path: Path) -> None:
    model = Case("llama").model()
    expected = ablated(model)
    for i, layer in enumerate(model.base_model.model.model.layers):
        model.base_model.model.model.layers[i] = torch.compile(layer, backend="eager")
    gr.export_deployed(model, tmp_path)
    loaded = PeftModel.from_pretrained(Case("llama").base(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.corner("an export holds `modules_to_save`, which vLLM refuses", "a warning")
def test_whole_modules_in_an_export_are_warned_of(tmp_path: Path) -> None:
    model = Case("llama", options={"modules_to_save": ["lm_head"]}).model()
    with pytest.warns(gr.GradRouteWarning, match=r"`lm_head\.weight` \(`modules_to_save`\): .*vLLM refuses.*Fix"):
        gr.export_deployed(model, tmp_path)


def test_a_tower_without_a_config_is_exported(tmp_path: Path) -> None:
    make = partial(get_peft_model, peft_config=config())
    torch.manual_seed(0)
    base = Tower()
    values = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model, x = randomize_blocks(make(base)), torch.randn(2, 5)
    gr.export_deployed(model, tmp_path)
    fresh = Tower()
    fresh.load_state_dict(values)
    with gr.ablate_quarantine(model), torch.no_grad():
        assert_near(PeftModel.from_pretrained(fresh, tmp_path)(x), model(x))
