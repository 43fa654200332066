"""Handles on an optimizer: they end when they are closed, when their optimizer is gone, and in every copy."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from support.gradient_directions import drawn_directions
from support.models import routed_tower
from support.tower_steps import adamw, backward, parameter_directions, step, trained
from torch import nn
from torch.optim import Optimizer

import gradroute as gr
from gradroute._step_hooks import StepHooks
from gradroute.optim import block_groups, decay_toward_start, project_updates, slow_start


def attached(model: nn.Module, optimizer: Optimizer) -> StepHooks:
    f = gr.ProjectionFilter(drawn_directions(model), mode="erase", side="two")
    return gr.attach_filter(optimizer, f, model=model)


HANDLES: dict[str, Callable[[nn.Module, Optimizer], StepHooks]] = {
    "attach_filter": attached,
    "audit_updates": gr.audit_updates,
    "decay_toward_start": lambda model, optimizer: decay_toward_start(model, optimizer, 0.1),
    "project_updates": lambda model, optimizer: project_updates(model, optimizer, parameter_directions(model)),
    "skip_idle_blocks": gr.skip_idle_blocks,
    "slow_start": lambda model, optimizer: slow_start(model, optimizer, steps=9),
}
each_handle = pytest.mark.parametrize("kind", HANDLES)


def hooks(model: nn.Module, optimizer: Optimizer | None) -> int:
    """All that are registered anywhere."""
    count = 0
    if optimizer is not None:
        count += len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
        count += len(optimizer._optimizer_state_dict_pre_hooks)
    count += sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
    return count + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def by_block(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(block_groups(model), lr=0.01, weight_decay=0.0)


def made(kind: str) -> tuple[nn.Module, Optimizer, StepHooks]:
    model = routed_tower()
    optimizer = by_block(model)
    return model, optimizer, HANDLES[kind](model, optimizer)


@each_handle
def test_a_handle_ends_with_close_and_with_its_block(kind: str) -> None:
    model, optimizer, handle = made(kind)
    assert handle.is_open
    assert hooks(model, optimizer) > 0
    handle.close()
    handle.close()
    assert not handle.is_open
    assert hooks(model, optimizer) == 0
    with HANDLES[kind](model, optimizer) as other:
        step(model, optimizer, "absorb")
    assert other is not handle
    assert hooks(model, optimizer) == 0


@each_handle
def test_an_error_inside_the_block_ends_it_as_well(kind: str) -> None:
    model, optimizer, handle = made(kind)
    with pytest.raises(ZeroDivisionError):
        with handle:
            _ = 1 / 0
    assert hooks(model, optimizer) == 0


@pytest.mark.corner("an optimizer with handles is deleted", "its hooks end with it")
@each_handle
@pytest.mark.parametrize("handle_is_held", [True, False])
def test_hooks_do_not_outlive_their_optimizer_and_no_cycle_keeps_it(kind: str, handle_is_held: bool) -> None:
    model, optimizer, handle = made(kind)
    gone = weakref.ref(optimizer)
    gc.collect()
    gc.disable()  # references alone have to do
    try:
        if not handle_is_held:
            del handle
        del optimizer
        assert gone() is None
        assert hooks(model, None) == 0
        assert not handle_is_held or not handle.is_open
    finally:
        gc.enable()
    # The next optimizer takes the same filter, and trains.
    optimizer = by_block(model)
    HANDLES[kind](model, optimizer)
    step(model, optimizer, "absorb")


@pytest.mark.slow
def test_a_handle_that_changes_steps_goes_on_when_nobody_holds_it_and_one_that_is_read_ends() -> None:
    for kind in HANDLES:
        model, optimizer, handle = made(kind)
        alive = weakref.ref(handle)
        del handle
        gc.collect()
        assert (alive() is None) == (kind == "audit_updates")
        assert (hooks(model, optimizer) == 0) == (kind == "audit_updates")


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copied: nn.Module = torch.load(file, weights_only=False)
    return copied


@pytest.mark.corner("a model with handles is copied, pickled or saved", "the copy has none")
@each_handle
@pytest.mark.parametrize("make_copy", [copy.deepcopy, saved, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_or_saved_model_trains_without_the_handle(kind: str, make_copy: Callable) -> None:
    """`torch.save(model)` failed on a lambda of `skip_idle_blocks`, and a deepcopy took the optimizer along."""
    model, optimizer, handle = made(kind)
    step(model, optimizer, "absorb")
    copied, plain = make_copy(model), make_copy(model)
    before = repr(handle)
    for each in (copied, plain):
        its = adamw(each)
        backward(each, "keep")
        its.step()
    assert repr(handle) == before
    assert all(torch.equal(a, b) for a, b in zip(trained(copied), trained(plain), strict=True))
    step(model, optimizer, "absorb")
    assert handle.is_open


@each_handle
def test_a_copied_or_saved_optimizer_has_no_handle(kind: str) -> None:
    _, optimizer, _ = made(kind)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert not getattr(copied, "_optimizer_step_pre_hooks", None)
        copied.step()


@each_handle
@pytest.mark.parametrize("make_copy", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_handle_itself_is_not_copied(kind: str, make_copy: Callable) -> None:
    _, _, handle = made(kind)
    with pytest.raises(gr.GradRouteError, match="belongs to one optimizer and cannot be copied or pickled"):
        make_copy(handle)


# Optimizers that do not hold the blocks


@pytest.mark.corner("audits, filters and corrections of an optimizer that was made before `attach`", "`GradRouteError`")
@pytest.mark.parametrize("kind", sorted({*HANDLES}))
def test_an_optimizer_made_before_attach_is_refused(kind: str) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    gr.attach(model, r=2, lora_alpha=4.0)
    with pytest.raises(gr.GradRouteError, match="would never be trained. Fix: make the optimizer after attach"):
        if kind == "project_updates":
            project_updates(model, optimizer, drawn_directions(model))
        else:
            HANDLES[kind](model, optimizer)


@pytest.mark.parametrize("kind", ["audit_updates", "decay_toward_start", "skip_idle_blocks"])
@pytest.mark.parametrize("block", [gr.deployed_parameters, gr.quarantine_parameters])
def test_a_block_that_no_optimizer_holds_is_found_unless_it_is_frozen_or_held_by_another(
    kind: str, block: Callable
) -> None:
    model = routed_tower()
    left_out = [p for _, p in block(model)]
    held = [p for p in trained(model) if not any(p is other for other in left_out)]
    optimizer = torch.optim.AdamW(held, weight_decay=0.0)
    with pytest.raises(gr.GradRouteError, match="Found that it lacks 4 of 8, those of `lower`, `upper`"):
        HANDLES[kind](model, optimizer)
    function = {"audit_updates": gr.audit_updates, "skip_idle_blocks": gr.skip_idle_blocks}.get(
        kind, lambda model, optimizer, **rest: decay_toward_start(model, optimizer, 0.1, **rest)
    )
    other = torch.optim.AdamW(left_out, weight_decay=0.0)
    with function(model, optimizer, others=[other]), function(model, other, others=[optimizer]):
        backward(model, "absorb")
        optimizer.step()
        other.step()
    for parameter in left_out:
        parameter.requires_grad_(False)
    function(model, optimizer)
