"""What every PEFT case starts from: bitwise the base model, both blocks trained, the dtype, ranks and scalings."""

from typing import Any

import pytest
import torch
from support.models import randomize_blocks
from support.peft_cases import ATTENTION, Case, X, each_case, each_plain_case, far, logits
from torch import nn

import gradroute as gr
from gradroute._protocol import routed_layers

pytestmark = pytest.mark.touches_peft

BLOCKS = ("deployed", "quarantine")


@each_case
def test_a_new_adapter_leaves_the_output_as_it_was_bitwise(case: Case) -> None:
    expected, model = logits(case.base()), case.fresh()
    for _, B in [*_matrices(model, "lora_B."), *_matrices(model, "lora_B_quarantine.")]:
        assert not B.any()
    for _, A in [*_matrices(model, "lora_A."), *_matrices(model, "lora_A_quarantine.")]:
        assert A.any()
    assert torch.equal(logits(model), expected)
    assert torch.equal(model.train()(X).logits, expected)
    randomize_blocks(model)
    assert far(logits(model), expected)


@each_case
def test_the_trainable_parameters_are_both_blocks_and_modules_to_save(case: Case) -> None:
    model = case.fresh()
    deployed, quarantine = dict(gr.deployed_parameters(model)), dict(gr.quarantine_parameters(model))
    saved_modules = {name for name, _ in model.named_parameters() if ".modules_to_save." in name}
    assert bool(saved_modules) == ("modules_to_save" in case.options)
    assert not deployed.keys() & quarantine.keys()
    assert {
        n for n, p in model.named_parameters() if p.requires_grad
    } == deployed.keys() | quarantine.keys() | saved_modules
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in deployed)
    assert all("_quarantine.default." in name for name in quarantine)
    assert {".lora_" in name for name in saved_modules} <= {False}


@each_plain_case
def test_the_dtype_of_both_blocks_is_the_bases_or_float32(case: Case) -> None:
    model, expected = case.fresh(), torch.float32 if case.autocast_adapter_dtype else case.dtype
    parameters = [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]
    assert {parameter.dtype for _, parameter in parameters} == {expected}


def test_ranks_and_scalings_follow_the_patterns() -> None:
    def blocks(**options: Any) -> dict[str, list[tuple[int, float]]]:
        layers = routed_layers(Case("llama", options={"target_modules": ATTENTION, **options}).fresh())
        return {
            name[-6:]: [(block.A.shape[0], block.scaling) for block in (layer.deployed, layer.quarantine)]
            for name, layer in layers.items()
            if ".0." in name
        }

    assert blocks()["q_proj"] == [(3, 2.0), (4, 1.5)]
    assert blocks(r_quarantine=None)["q_proj"] == [(3, 2.0), (3, 2.0)]
    patterned = blocks(rank_pattern={"q_proj": 6}, alpha_pattern={"k_proj": 12})
    assert patterned == {
        "q_proj": [(6, 1.0), (4, 1.5)],
        "k_proj": [(3, 4.0), (4, 3.0)],
        "v_proj": [(3, 2.0), (4, 1.5)],
        "o_proj": [(3, 2.0), (4, 1.5)],
    }
    assert blocks(rank_pattern={"q_proj": 6}, r_quarantine=None)["q_proj"] == [(6, 1.0), (6, 1.0)]
    rooted = blocks(use_rslora=True, rank_pattern={"q_proj": 16}, lora_alpha=8)
    assert rooted["q_proj"] == [(16, 2.0), (4, 4.0)]
    assert rooted["k_proj"] == [(3, pytest.approx(8 / 3**0.5)), (4, pytest.approx(4.0))]


def test_a_gaussian_start_has_the_deviation_that_peft_gives_it() -> None:
    torch.manual_seed(0)
    options = {"init_lora_weights": "gaussian", "r": 8, "r_quarantine": 32}
    layers = routed_layers(Case("llama", options=options).fresh())
    A = {block: torch.cat([getattr(layer, block).A.flatten() for layer in layers.values()]) for block in BLOCKS}
    for block, rank in (("deployed", 8), ("quarantine", 32)):
        assert A[block].std().item() == pytest.approx(1 / rank, rel=0.05)
    uniform = routed_layers(Case("llama", options={"r": 8, "r_quarantine": 32}).fresh())
    name, layer = next(iter(uniform.items()))
    bound = layer.base_weight().shape[1] ** -0.5
    for block in BLOCKS:
        values = getattr(layer, block).A
        assert 0.9 * bound < values.abs().max() <= bound, name


def _matrices(model: nn.Module, kind: str) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if kind in name]
