"""Activation checkpointing runs forwards again inside backward: exact while the route is open, refused otherwise."""

import pytest
import torch
from models import gradients, routed_tower
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradroute as gr

ZONES = ["keep", "absorb", "route"]
FIRST, SECOND = gr.RouteMask.zones(ZONES), gr.RouteMask.zones(ZONES[::-1])
both_modes = pytest.mark.parametrize("use_reentrant", [True, False])


def x() -> Tensor:
    # Reentrant checkpointing needs an input that requires a gradient.
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()


def loss_of(model: nn.Module, use_reentrant: bool | None) -> Tensor:
    if use_reentrant is None:
        return model(x()).pow(2).sum()
    return checkpoint(model, x(), use_reentrant=use_reentrant).pow(2).sum()


def routed_gradients(use_reentrant: bool | None, mask: gr.RouteMask = FIRST) -> dict[str, Tensor]:
    model = routed_tower()
    with gr.route(model, mask):
        loss_of(model, use_reentrant).backward()
    return gradients(model)


@both_modes
def test_checkpointed_equals_plain_with_the_route_around_forward_and_backward(use_reentrant: bool) -> None:
    plain, checkpointed = routed_gradients(None), routed_gradients(use_reentrant)
    assert any(not torch.equal(plain[name], routed_gradients(None, SECOND)[name]) for name in plain)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@both_modes
def test_a_route_closed_before_backward_raises(use_reentrant: bool) -> None:
    model = routed_tower()
    with gr.route(model, FIRST):
        loss = loss_of(model, use_reentrant)
    with pytest.raises(gr.RouteError, match="enclose both forward and backward"):
        loss.backward()


@both_modes
def test_a_sticky_route_cleared_before_backward_raises(use_reentrant: bool) -> None:
    model = routed_tower()
    gr.set_route(model, FIRST)
    loss = loss_of(model, use_reentrant)
    gr.clear_route(model)
    with pytest.raises(gr.RouteError, match="enclose both forward and backward"):
        loss.backward()


@both_modes
def test_backward_under_another_route_raises(use_reentrant: bool) -> None:
    model = routed_tower()
    with gr.route(model, FIRST):
        first = loss_of(model, use_reentrant)
    with pytest.raises(gr.RouteError), gr.route(model, SECOND):
        (first + loss_of(model, use_reentrant)).backward()


@both_modes
def test_a_forward_before_the_route_opens_raises(use_reentrant: bool) -> None:
    model = routed_tower()
    loss = loss_of(model, use_reentrant)
    with pytest.raises(gr.RouteError), gr.route(model, FIRST):
        loss.backward()


@both_modes
def test_backward_under_another_ablation_raises(use_reentrant: bool) -> None:
    model = routed_tower()
    with gr.ablate_quarantine(model, 0.5):
        loss = loss_of(model, use_reentrant)
    with pytest.raises(gr.RouteError, match="another route or ablation"):
        loss.backward()
    loss = loss_of(model, use_reentrant)
    with gr.ablate_quarantine(model, 0.5), pytest.raises(gr.RouteError, match="another route or ablation"):
        loss.backward()


@both_modes
def test_one_of_two_forwards_back_propagated_under_the_other_route_raises(use_reentrant: bool) -> None:
    model = routed_tower()
    with gr.route(model, FIRST):
        first = loss_of(model, use_reentrant)
    with gr.route(model, SECOND):
        loss_of(model, use_reentrant)
        with pytest.raises(gr.RouteError):
            first.backward()


@both_modes
def test_a_route_ended_by_an_exception_is_closed_for_backward_too(use_reentrant: bool) -> None:
    model = routed_tower()
    with pytest.raises(KeyError), gr.route(model, FIRST):
        loss = loss_of(model, use_reentrant)
        raise KeyError
    with pytest.raises(gr.RouteError):
        loss.backward()


@both_modes
def test_scoring_under_a_route_and_discarded_losses_raise_no_alarm_later(use_reentrant: bool) -> None:
    model = routed_tower()
    with gr.route(model, FIRST), torch.no_grad():
        model(x())
    with gr.route(model, FIRST):
        loss_of(model, use_reentrant)
    loss_of(model, use_reentrant).backward()
    assert gradients(model)


@both_modes
def test_two_backwards_through_one_forward_are_exact(use_reentrant: bool) -> None:
    model = routed_tower()
    with gr.route(model, FIRST):
        loss = loss_of(model, use_reentrant)
        loss.backward(retain_graph=True)
        loss.backward()
    once = routed_gradients(None)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, 2 * once[name], rtol=1e-12, atol=1e-12)


def test_an_unknown_reentrant_checkpoint_is_refused() -> None:
    class Homemade(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, run: nn.Module, inputs: Tensor) -> Tensor:
            ctx.run = run
            ctx.save_for_backward(inputs)
            with torch.no_grad():
                return run(inputs)

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> tuple[None, Tensor]:
            (inputs,) = ctx.saved_tensors
            inputs = inputs.detach().requires_grad_()
            with torch.enable_grad():
                output = ctx.run(inputs)
            torch.autograd.backward(output, gradient)
            return None, inputs.grad

    model = routed_tower()
    with gr.route(model, FIRST), pytest.raises(gr.RouteError, match="not torch.utils.checkpoint"):
        Homemade.apply(model, x()).sum().backward()


@both_modes
def test_micro_batches_with_a_mask_each_accumulate_exactly(use_reentrant: bool) -> None:
    model = routed_tower()
    for mask in (FIRST, SECOND):
        with torch.no_grad(), gr.ablate_quarantine(model):
            model(x())  # the pass that scores the rollouts
        with gr.route(model, mask):
            loss_of(model, use_reentrant).backward()
    first, second = routed_gradients(None, FIRST), routed_gradients(None, SECOND)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, first[name] + second[name], rtol=1e-12, atol=1e-12)


@both_modes
def test_unrouted_training_after_a_routed_step_is_not_disturbed(use_reentrant: bool) -> None:
    model, fresh = routed_tower(), routed_tower()
    with gr.route(model, FIRST):
        loss_of(model, use_reentrant).backward()
    model.zero_grad()
    loss_of(model, use_reentrant).backward()
    loss_of(fresh, None).backward()
    expected = gradients(fresh)
    assert all(torch.equal(expected[name], gradient) for name, gradient in gradients(model).items())
