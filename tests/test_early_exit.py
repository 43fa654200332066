"""Extraction runs no block above the last that is read, and reads the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from language_models import PAIRS, routed_mixer, tiny_llama
from torch import nn

import gradroute as gr
from gradroute.directions.early_exit import block_after, ended_before

LOWER = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]


def blocks_run(model: nn.Module, extract: Callable[[], Any]) -> list[int]:
    """How many times each block begins and ends, and the head."""
    counts = [0, 0, 0]
    watched = [*model.model.layers, model.lm_head]

    def count(i: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[i] += 1

        return hook

    handles = [module.register_forward_hook(count(i)) for i, module in enumerate(watched)]
    try:
        extract()
    finally:
        for handle in handles:
            handle.remove()
    return counts


@pytest.mark.parametrize("features", ["bottleneck", "input", "output"])
def test_blocks_above_the_last_that_is_read_are_not_run(features: str) -> None:
    model = tiny_llama()
    assert len(model.model.layers) == 2
    found: list[gr.Directions] = []

    def extract(modules: list[str] | None) -> Callable[[], None]:
        return lambda: found.append(
            gr.extract_activation_directions(model, PAIRS, features=features, modules=modules, batch_size=8)
        )

    assert blocks_run(model, extract(None)) == [1, 1, 1]
    assert blocks_run(model, extract(LOWER)) == [1, 0, 0]
    whole, early = found
    assert set(early.hack) == set(LOWER)
    for name in LOWER:
        assert torch.equal(whole.hack[name], early.hack[name])
        assert torch.equal(whole.clean[name], early.clean[name])
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]))  # no hook is left


def test_of_residuals_the_block_itself_is_run() -> None:
    model = tiny_llama()
    modules = ["model.layers.0"]

    def extract() -> None:
        gr.extract_activation_directions(model, PAIRS, features="residual", modules=modules, batch_size=8)

    assert blocks_run(model, extract) == [1, 0, 0]


def test_a_forward_of_ones_own_runs_through() -> None:
    model = tiny_llama()

    def extract() -> None:
        gr.extract_activation_directions(
            model, PAIRS, modules=LOWER, batch_size=8, forward_fn=lambda m, ids, mask: m(ids, attention_mask=mask)
        )

    assert blocks_run(model, extract) == [1, 1, 1]


def looped(model: nn.Module) -> None:
    model.config.num_hidden_layers = 4


def hooked_by_accelerate(model: nn.Module) -> None:
    model.model.layers[1]._hf_hook = object()


def compiled(model: nn.Module) -> None:
    model.model.layers[1]._compiled_call_impl = lambda: None


@pytest.mark.parametrize("change", [looped, hooked_by_accelerate, compiled])
def test_where_leaving_a_forward_would_skip_something_it_runs_through(change: Callable[[nn.Module], None]) -> None:
    model = tiny_llama()
    assert block_after(model, LOWER) is model.model.layers[1]
    change(model)
    assert block_after(model, LOWER) is None


def test_what_is_read_outside_the_blocks_or_in_the_last_has_no_block_after_it() -> None:
    model = tiny_llama()
    assert block_after(model, ["model.layers.1.mlp.up_proj"]) is None
    assert block_after(model, [*LOWER, "lm_head"]) is None
    assert block_after(routed_mixer(), ["q"]) is None


def test_only_its_own_exception_is_caught_and_the_hook_is_gone_after_any_other() -> None:
    model = tiny_llama()
    with pytest.raises(ZeroDivisionError), ended_before(model.model.layers[1]):
        raise ZeroDivisionError
    assert not model.model.layers[1]._forward_pre_hooks
