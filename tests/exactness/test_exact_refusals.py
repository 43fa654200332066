"""What cannot be right raises: double backward, layers that did not run, masks that do not fit."""

from collections.abc import Callable

import pytest
import torch
from matrix import Record, cells
from torch import Tensor
from two_pass import (
    batch,
    layer_batch,
    loss_of,
    routed_layer,
    routed_model,
    rows_mask,
    tokens_mask,
)

import gradroute as gr

pytestmark = pytest.mark.touches_peft

EVERY = "llama, qwen3, gpt2, moe"
LINEAR = "llama, qwen3, moe"


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"quadratic": lambda y: y.pow(2).sum(), "linear": lambda y: y.sum()}


@cells("penalty on a gradient of a {loss} loss (double backward)", PEFT=EVERY, attach=LINEAR, loss=LOSSES)
def test_double_backward_is_refused(architecture: str, adapters: str, loss: str, record: Record) -> None:
    # Of a linear loss, dy needs no gradient; dA = B' dy x' depends on B all the same.
    layer = routed_layer(architecture, adapters)
    with gr.route(layer, rows_mask()):
        value = LOSSES[loss](layer(layer_batch(layer).x))
        with pytest.raises((RuntimeError, gr.GradRouteError), match="differentia|double backward") as refusal:
            (gradient,) = torch.autograd.grad(value, layer.deployed.A, create_graph=True)
            (value + gradient.pow(2).sum()).backward()
    record.refused(refusal.value)


@cells("a targeted layer that did not run", PEFT=EVERY, attach=LINEAR)
def test_a_layer_that_did_not_run_is_noticed(architecture: str, adapters: str, record: Record) -> None:
    model = routed_model(architecture, adapters)
    base = model.get_base_model() if adapters == "PEFT" else model
    layers = base.transformer.h if architecture == "gpt2" else base.model.layers
    skipped = layers[1].forward
    layers[1].forward = lambda hidden_states, *_, **__: hidden_states
    with (
        pytest.raises(gr.errors.RouteError, match="did not run inside the route") as refusal,
        gr.route(model, rows_mask()),
    ):
        loss_of(model, batch()).backward()
    layers[1].forward = skipped
    with gr.route(model, rows_mask()):
        loss_of(model, batch()).backward()
    record.refused(refusal.value)


MISFITS = {
    "of 4 rows for 3": lambda: gr.RouteMask.zones(["keep"] * 4),
    "of 5 tokens for 6": lambda: tokens_mask(seq=5),
    "(1, tokens) for 3 rows": lambda: tokens_mask(1, 18),
}


@cells("mask {misfit}", PEFT=EVERY, attach=LINEAR, misfit=MISFITS)
def test_a_mask_that_does_not_fit_is_refused(architecture: str, adapters: str, misfit: str, record: Record) -> None:
    model = routed_model(architecture, adapters)
    with pytest.raises(gr.errors.RouteError, match="should match the leading axes") as refusal:
        with gr.route(model, MISFITS[misfit]()):
            loss_of(model, batch())
    record.refused(refusal.value)
