"""What PEFT's helpers do to scalings, dtypes and gradients of an adapter, they do to both blocks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from support.llama_adapters import LLAMA
from support.peft_cases import Case, X, assert_near, assert_views_equal, distance, far, logits, tensors_of, unnamed_base
from torch import nn

import gradroute as gr
from gradroute._protocol import routed_layers

pytestmark = [pytest.mark.touches_peft, unnamed_base]
BF16 = Case("llama", torch.bfloat16)


def test_rescaling_an_adapter_rescales_both_blocks() -> None:
    model, layer = LLAMA.model(), None
    with rescale_adapter_scale(model, 0.5):
        layer = next(iter(routed_layers(model).values()))
        assert (layer.deployed.scaling, layer.quarantine.scaling) == (1.0, 0.75)
        assert distance(logits(model), LLAMA.views().on) > 0.2
    assert_views_equal(model, LLAMA.views())
    layer.set_scale("default", 2.0)
    assert (layer.deployed.scaling, layer.quarantine.scaling) == (4.0, 3.0)
    layer.scale_layer(0.5)
    assert (layer.deployed.scaling, layer.quarantine.scaling) == (2.0, 1.5)
    layer.unscale_layer()
    assert (layer.deployed.scaling, layer.quarantine.scaling) == (2.0, 1.5)


def test_without_casts_of_the_input_both_blocks_are_still_seen() -> None:
    model = BF16.model()
    with disable_input_dtype_casting(model):
        assert_views_equal(model, BF16.views())


def test_lora_plus_gives_both_Bs_the_higher_rate() -> None:
    model = LLAMA.model()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name.split(".")[-3]: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert found == {"lora_A": 1e-3, "lora_B": 16e-3, "lora_A_quarantine": 1e-3, "lora_B_quarantine": 16e-3}


@pytest.mark.parametrize(
    "make",
    [
        lambda model: create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=0.1, loraplus_lr_ratio=2, weight_decay=0.0, loraplus_weight_decay=0.0
        ),
        pytest.param(
            lambda model: create_lorafa_optimizer(model, r=3, lora_alpha=6, lr=0.1),
            marks=pytest.mark.xfail(
                strict=True,
                reason='LoRA-FA keeps its moments under the name before "lora": both blocks of a layer share them',
            ),
        ),
    ],
    ids=["LoRA+", "LoRA-FA"],
)
def test_an_optimizer_of_peft_moves_no_deployed_block_on_routed_rows(
    make: Callable[[nn.Module], torch.optim.Optimizer],
) -> None:
    model = Case("llama", options={"r_quarantine": 3}).model().train()
    optimizer, before = make(model), tensors_of(model)
    for _ in range(2):
        optimizer.zero_grad()
        with gr.route(model, gr.RouteMask.zones(["route"] * len(X))):
            model(X, labels=X).loss.backward()
        optimizer.step()
    after = tensors_of(model)
    assert any(not torch.equal(after[name], before[name]) for name, _ in gr.quarantine_parameters(model))
    assert [name for name, _ in gr.deployed_parameters(model) if not torch.equal(after[name], before[name])] == []


def test_the_count_of_trainable_parameters_includes_both_blocks() -> None:
    model = LLAMA.model()
    both = [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for _, p in both)


@pytest.mark.parametrize("trainable_", [True, False])
def test_is_trainable_decides_over_both_blocks(trainable_: bool, tmp_path: Path) -> None:
    model = LLAMA.model()
    model.save_pretrained(tmp_path)
    config = gr.QuarantineLoraConfig.from_pretrained(tmp_path)
    for loaded in (
        gr.load_quarantined(LLAMA.base(), tmp_path, is_trainable=trainable_),
        PeftModel.from_pretrained(LLAMA.base(), tmp_path, config=config, is_trainable=trainable_),
    ):
        both = [*gr.deployed_parameters(loaded), *gr.quarantine_parameters(loaded)]
        assert {p.requires_grad for _, p in both} == {trainable_}


def test_an_adapter_loaded_for_inference_draws_no_dropout(tmp_path: Path) -> None:
    case = Case("llama", options={"lora_dropout": 0.5})
    case.model().save_pretrained(tmp_path)
    loaded = gr.load_quarantined(case.base(), tmp_path, is_trainable=False)
    assert_views_equal(loaded, case.views())


def test_one_dropout_mask_serves_both_blocks() -> None:
    """With A and B of the quarantine the negative of the deployed block's, both contributions cancel or add up."""
    case = Case("llama", options={"lora_dropout": 0.5, "r_quarantine": 3})
    model = case.fresh()
    with torch.no_grad():
        for layer in routed_layers(model).values():
            layer.deployed.B.normal_()
            layer.quarantine.A.copy_(layer.deployed.A)
            layer.quarantine.B.copy_(-layer.deployed.B)
    with gr.ablate_quarantine(model):
        assert far(logits(model), case.views().base)
    model.train()
    assert_near(logits(model), case.views().base)
