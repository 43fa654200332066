"""Masks decided after the forward: exact, as the same mask given beforehand; refused where backward comes first."""

import re

import pytest
import torch
from matrix import Record, cells
from support.import_hook import compiles
from torch import nn
from two_pass import (
    MASKS,
    Batch,
    Gradients,
    added,
    batch,
    expected_gradients,
    gradients,
    loss_of,
    reference,
    relative_error,
    routed_gradients,
    routed_model,
    rows_mask,
    weighted_rows_mask,
    weighted_tokens_mask,
)

import gradroute as gr
from gradroute.adapters import PendingMask
from gradroute.errors import RouteError

EVERY = "llama, qwen3, gpt2, moe"
MODES = [True, False]

pytestmark = [
    pytest.mark.touches_peft,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
]


def late_gradients(model: nn.Module, rows: Batch, mask: gr.RouteMask) -> Gradients:
    """The gradients after a forward under m alone, and a backward once `mask` is decided."""
    with gr.route(model, PendingMask(mask.m)) as pending:
        loss = loss_of(model, rows)
        pending.decide(mask)
        loss.backward()
    return gradients(model)


def checkpointed(architecture: str, adapters: str, use_reentrant: bool) -> nn.Module:
    model: nn.Module = routed_model(architecture, adapters).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    return model


@cells("decided late, {mask}", PEFT=EVERY, attach="llama", mask=MASKS)
def test_a_mask_decided_late_is_exact(architecture: str, adapters: str, mask: str, record: Record) -> None:
    expected = expected_gradients(reference(architecture, adapters), batch(), MASKS[mask]())
    found = late_gradients(routed_model(architecture, adapters), batch(), MASKS[mask]())
    given = routed_gradients(routed_model(architecture, adapters), batch(), MASKS[mask]())
    assert all(torch.equal(found[name], given[name]) for name in given)
    record.exact(relative_error(found, expected), 1e-12, ", bitwise as one given beforehand")


@cells("decided late, two micro-batches accumulated", PEFT=EVERY, attach="llama")
def test_late_masks_accumulate_exactly(architecture: str, adapters: str, record: Record) -> None:
    steps = [(batch(0), weighted_tokens_mask()), (batch(1), rows_mask())]
    expected = added(*(reference(architecture, adapters).gradients(*step) for step in steps))
    swapped = [(batch(0), rows_mask()), (batch(1), weighted_tokens_mask())]
    assert relative_error(added(*(reference(architecture, adapters).gradients(*s) for s in swapped)), expected) > 0.3
    model = routed_model(architecture, adapters)
    for rows, mask in steps:
        found = late_gradients(model, rows, mask)
    record.exact(relative_error(found, expected), 1e-12)


@cells("decided late, use_reentrant={use_reentrant}", PEFT=EVERY, attach="llama", use_reentrant=MODES)
def test_a_checkpointed_late_mask_is_exact(
    architecture: str, adapters: str, use_reentrant: bool, record: Record
) -> None:
    expected = expected_gradients(reference(architecture, adapters), batch(), weighted_tokens_mask())
    found = late_gradients(checkpointed(architecture, adapters, use_reentrant), batch(), weighted_tokens_mask())
    record.exact(relative_error(found, expected), 1e-12)


@cells("decided late, two routes, use_reentrant={use_reentrant}", PEFT="llama", attach="llama", use_reentrant=MODES)
def test_two_checkpointed_late_masks_are_exact(
    architecture: str, adapters: str, use_reentrant: bool, record: Record
) -> None:
    first, second = (batch(0), weighted_rows_mask()), (batch(1), weighted_tokens_mask())
    two_pass = reference(architecture, adapters)
    expected = added(two_pass.gradients(*first), two_pass.gradients(*second))
    assert relative_error(added(two_pass.gradients(batch(0), second[1]), two_pass.gradients(*second)), expected) > 0.3
    model = checkpointed(architecture, adapters, use_reentrant)
    with gr.route(model, PendingMask(first[1].m)) as outer:
        loss = loss_of(model, first[0])
        with gr.route(model, PendingMask(second[1].m)) as inner:
            loss = loss + loss_of(model, second[0])
            inner.decide(second[1])
            outer.decide(first[1])
            loss.backward()
    record.exact(relative_error(gradients(model), expected), 1e-12)


@cells("decided late, activations offloaded with save_on_cpu", PEFT=EVERY, attach="llama")
def test_a_late_mask_under_save_on_cpu_is_exact(architecture: str, adapters: str, record: Record) -> None:
    model, mask = routed_model(architecture, adapters), weighted_tokens_mask()
    expected = expected_gradients(reference(architecture, adapters), batch(), mask)
    with gr.route(model, PendingMask(mask.m)) as pending:
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(model, batch())
        pending.decide(mask)
        loss.backward()
    record.exact(relative_error(gradients(model), expected), 1e-12)


@cells("backward before the decision", PEFT=EVERY, attach="llama")
def test_a_backward_before_the_decision_is_refused(architecture: str, adapters: str, record: Record) -> None:
    model = routed_model(architecture, adapters)
    with pytest.raises(RouteError, match="between forward and backward") as refusal, gr.route(model, PendingMask.on(3)):
        loss_of(model, batch()).backward()
    assert all(p.grad is None for _, p in gr.deployed_parameters(model)), "a gradient was left behind"
    record.refused(refusal.value)


@compiles
@cells("decided late, torch.compile(fullgraph=True)", PEFT="llama", attach="llama")
def test_a_compiled_forward_refuses_a_late_mask(architecture: str, adapters: str, record: Record) -> None:
    torch._dynamo.reset()
    model = routed_model(architecture, adapters)
    fast = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="needs an eager one") as refusal, gr.route(model, PendingMask.on(3)):
        loss_of(fast, batch())
    torch._dynamo.reset()
    sentence = re.search(r"A mask that is decided after the forward needs an eager one", str(refusal.value))
    assert sentence is not None
    record.refused(sentence.group(), type(refusal.value).__name__)
