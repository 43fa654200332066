"""Activation checkpointing: the forward runs again inside backward; exact under an open route, refused after it."""

import pytest
import torch
from matrix import Record, cells
from torch import nn
from two_pass import (
    MASKS,
    added,
    batch,
    expected_gradients,
    gradients,
    loss_of,
    reference,
    relative_error,
    routed_model,
    rows_mask,
    weighted_tokens_mask,
)

import gradroute as gr
from gradroute._protocol import RoutedLayer

EVERY = "llama, qwen3, gpt2, moe"
MODES = [True, False]
TWO_MASKS = ["zones per row", "weights per token"]

pytestmark = [
    pytest.mark.touches_peft,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]


class Checkpointed:
    """A routed model that checkpoints every decoder layer, and a count of one routed layer's forwards."""

    def __init__(self, architecture: str, adapters: str, use_reentrant: bool) -> None:
        self.model: nn.Module = routed_model(architecture, adapters).train()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        if use_reentrant:
            self.model.enable_input_require_grads()
        self.forwards = 0
        layer = next(module for module in self.model.modules() if isinstance(module, RoutedLayer))
        layer.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.forwards += 1


@cells("use_reentrant={use_reentrant}, {mask}", PEFT=EVERY, attach="llama", use_reentrant=MODES, mask=TWO_MASKS)
def test_a_checkpointed_step_is_exact(
    architecture: str, adapters: str, use_reentrant: bool, mask: str, record: Record
) -> None:
    expected = expected_gradients(reference(architecture, adapters), batch(), MASKS[mask]())
    run = Checkpointed(architecture, adapters, use_reentrant)
    with gr.route(run.model, MASKS[mask]()):
        loss_of(run.model, batch()).backward()
    assert run.forwards == 2, "nothing was checkpointed"
    record.exact(relative_error(gradients(run.model), expected), 1e-12)


@cells("use_reentrant={use_reentrant}, two forwards, both routes open", PEFT=EVERY, attach="llama", use_reentrant=MODES)
def test_two_forwards_before_one_backward_are_exact_under_open_routes(
    architecture: str, adapters: str, use_reentrant: bool, record: Record
) -> None:
    two_pass = reference(architecture, adapters)
    first, second = (batch(0), rows_mask()), (batch(1), weighted_tokens_mask())
    expected = added(two_pass.gradients(*first), two_pass.gradients(*second))
    under_the_last_mask = added(two_pass.gradients(batch(0), second[1]), two_pass.gradients(*second))
    assert relative_error(under_the_last_mask, expected) > 0.3
    run = Checkpointed(architecture, adapters, use_reentrant)
    with gr.route(run.model, first[1]):
        loss = loss_of(run.model, first[0])
        with gr.route(run.model, second[1]):
            (loss + loss_of(run.model, second[0])).backward()
    assert run.forwards == 4
    record.exact(relative_error(gradients(run.model), expected), 1e-12)


@cells("use_reentrant={use_reentrant}, two forwards, first closed", PEFT=EVERY, attach="llama", use_reentrant=MODES)
def test_two_forwards_are_refused_when_the_first_route_is_closed(
    architecture: str, adapters: str, use_reentrant: bool, record: Record
) -> None:
    run = Checkpointed(architecture, adapters, use_reentrant)
    with gr.route(run.model, rows_mask()):
        loss = loss_of(run.model, batch(0))
    with (
        gr.route(run.model, weighted_tokens_mask()),
        pytest.raises(gr.errors.RouteError, match="enclose both") as refusal,
    ):
        (loss + loss_of(run.model, batch(1))).backward()
    record.refused(refusal.value)


@cells("use_reentrant={use_reentrant}, route closed before backward", PEFT=EVERY, attach="llama", use_reentrant=MODES)
def test_a_route_closed_too_early_is_refused(
    architecture: str, adapters: str, use_reentrant: bool, record: Record
) -> None:
    run = Checkpointed(architecture, adapters, use_reentrant)
    with gr.route(run.model, rows_mask()):
        loss = loss_of(run.model, batch())
    with pytest.raises(gr.errors.RouteError, match="enclose both forward and backward") as refusal:
        loss.backward()
    assert run.forwards >= 1
    assert all(p.grad is None for _, p in gr.deployed_parameters(run.model)), "a wrong gradient was left behind"
    record.refused(refusal.value)


@cells("use_reentrant={use_reentrant}, activations offloaded", PEFT=EVERY, attach="llama", use_reentrant=MODES)
def test_checkpoints_under_save_on_cpu_are_exact(
    architecture: str, adapters: str, use_reentrant: bool, record: Record
) -> None:
    expected = expected_gradients(reference(architecture, adapters), batch(), weighted_tokens_mask())
    run = Checkpointed(architecture, adapters, use_reentrant)
    with gr.route(run.model, weighted_tokens_mask()):
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(run.model, batch())
        loss.backward()
    assert run.forwards == 2
    record.exact(relative_error(gradients(run.model), expected), 1e-12)
