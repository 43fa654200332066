"""Activation checkpointing runs forwards again inside backward: exact while the route is open, refused otherwise."""

from itertools import count

import pytest
import torch
from support.models import gradients, routed_tower
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import gradroute as gr

pytestmark = pytest.mark.touches_peft

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


@pytest.mark.corner("the route is closed before backward, with activation checkpointing", "`RouteError` in backward")
@both_modes
def test_a_route_closed_before_backward_raises(use_reentrant: bool) -> None:
    model = routed_tower()
    with gr.route(model, FIRST):
        loss = loss_of(model, use_reentrant)
    with pytest.raises(gr.errors.RouteError, match="enclose both forward and backward"):
        loss.backward()


@both_modes
def test_a_sticky_route_cleared_before_backward_raises(use_reentrant: bool) -> None:
    model = routed_tower()
    gr.adapters.set_route(model, FIRST)
    loss = loss_of(model, use_reentrant)
    gr.adapters.clear_route(model)
    with pytest.raises(gr.errors.RouteError, match="enclose both forward and backward"):
        loss.backward()


@pytest.mark.corner("backward runs under another route than the checkpointed forward", "`RouteError` in backward")
@both_modes
def test_backward_under_another_route_raises(use_reentrant: bool) -> None:
    model = routed_tower()
    with gr.route(model, FIRST):
        first = loss_of(model, use_reentrant)
    with pytest.raises(gr.errors.RouteError), gr.route(model, SECOND):
        (first + loss_of(model, use_reentrant)).backward()


@both_modes
def test_the_backward_inside_a_route_of_a_forward_before_it_raises(use_reentrant: bool) -> None:
    model = routed_tower()
    loss = loss_of(model, use_reentrant)
    with pytest.raises(gr.errors.RouteError, match="ran without a route"), gr.route(model, FIRST):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@both_modes
def test_a_checkpoint_without_gradients_does_not_count_as_run(use_reentrant: bool) -> None:
    model = routed_tower()
    with pytest.raises(gr.errors.RouteError, match="did not run inside the route"), gr.route(model, FIRST):
        with torch.no_grad():
            loss_of(model, use_reentrant)
    with gr.route(model, FIRST):
        loss_of(model, use_reentrant)


@both_modes
def test_an_ablation_closed_or_opened_before_backward_is_exact(use_reentrant: bool) -> None:
    def half_ablated(use_reentrant: bool | None) -> dict[str, Tensor]:
        model = routed_tower()
        with gr.ablate_quarantine(model, 0.5):
            loss = loss_of(model, use_reentrant)
        loss.backward()
        return gradients(model)

    expected, on = half_ablated(None), routed_tower()
    loss = loss_of(on, use_reentrant)
    with gr.ablate_quarantine(on, 0.5):
        loss.backward()
    fresh = routed_tower()
    loss_of(fresh, None).backward()
    for name, gradient in expected.items():
        assert not torch.equal(gradient, gradients(fresh)[name])
        assert torch.equal(gradient, half_ablated(use_reentrant)[name])
        assert torch.equal(gradients(fresh)[name], gradients(on)[name])


@both_modes
def test_two_forwards_before_one_backward_are_exact_while_both_routes_are_open(use_reentrant: bool) -> None:
    model = routed_tower()
    with gr.route(model, FIRST):
        first = loss_of(model, use_reentrant)
        with gr.route(model, SECOND):
            (first + loss_of(model, use_reentrant)).backward()
    one, other = routed_gradients(None, FIRST), routed_gradients(None, SECOND)
    for name, gradient in gradients(model).items():
        assert not torch.equal(one[name], other[name])
        torch.testing.assert_close(gradient, one[name] + other[name], rtol=1e-12, atol=1e-12)


@both_modes
def test_a_layer_that_runs_twice_in_one_checkpoint_under_two_views_is_exact(use_reentrant: bool) -> None:
    def twice(use_reentrant: bool | None) -> dict[str, Tensor]:
        model = routed_tower()

        def run(x: Tensor) -> Tensor:
            with gr.ablate_quarantine(model, 0.25):
                y = model(x)
            return y * model(2 * x)

        with gr.route(model, FIRST):
            y = run(x()) if use_reentrant is None else checkpoint(run, x(), use_reentrant=use_reentrant)
            y.sum().backward()
        return gradients(model)

    plain, checkpointed = twice(None), twice(use_reentrant)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_nested_checkpoints_are_exact_or_raise(outer: bool, inner: bool) -> None:
    def nested(model: nn.Module) -> Tensor:
        run = lambda x: checkpoint(model, x, use_reentrant=inner)  # noqa: E731
        return checkpoint(run, x(), use_reentrant=outer).pow(2).sum()

    model = routed_tower()
    with gr.route(model, FIRST):
        nested(model).backward()
    expected = routed_gradients(None)
    assert all(torch.equal(expected[name], gradient) for name, gradient in gradients(model).items())
    model = routed_tower()
    with gr.route(model, FIRST):
        loss = nested(model)
    with pytest.raises(gr.errors.RouteError):
        loss.backward()


@both_modes
def test_tensors_kept_on_the_cpu_by_other_hooks_are_exact_or_raise(use_reentrant: bool) -> None:
    def offloaded(model: nn.Module) -> Tensor:
        def run(x: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                return model(x)

        return checkpoint(run, x(), use_reentrant=use_reentrant).pow(2).sum()

    model = routed_tower()
    with gr.route(model, FIRST):
        offloaded(model).backward()
    expected = routed_gradients(None)
    assert all(torch.equal(expected[name], gradient) for name, gradient in gradients(model).items())
    model = routed_tower()
    with gr.route(model, FIRST):
        loss = offloaded(model)
    try:
        loss.backward()
    except gr.errors.RouteError:
        return
    assert all(torch.equal(expected[name], gradient) for name, gradient in gradients(model).items())


def checkpoint_by_hooks(model: nn.Module, x: Tensor) -> Tensor:
    """A non-reentrant checkpoint that is not torch's: it keeps no tensor, and backward runs the forward again."""
    places = count()

    def again(place: int) -> Tensor:
        kept: list[Tensor] = []
        with saved_tensors_hooks(lambda t: kept.append(t.detach()), lambda _: None), torch.enable_grad():
            model(x)
        return kept[place]

    with saved_tensors_hooks(lambda _: next(places), again):
        return model(x).sum()


def test_a_checkpoint_by_hooks_is_exact_in_its_own_state_and_raises_in_another() -> None:
    model, plain = routed_tower(), routed_tower()
    with gr.route(plain, FIRST):
        plain(x()).sum().backward()
    with gr.route(model, FIRST):
        checkpoint_by_hooks(model, x()).backward()
    expected = gradients(plain)
    assert all(torch.equal(expected[name], gradient) for name, gradient in gradients(model).items())
    for block in (gr.route(model, FIRST), gr.ablate_quarantine(model, 0.5)):
        with block:
            loss = checkpoint_by_hooks(model, x())
        with pytest.raises(gr.errors.RouteError, match="enclose both forward and backward"):
            loss.backward()


@both_modes
def test_one_of_two_forwards_back_propagated_under_the_other_route_raises(use_reentrant: bool) -> None:
    model = routed_tower()
    with gr.route(model, FIRST):
        first = loss_of(model, use_reentrant)
    with gr.route(model, SECOND):
        loss_of(model, use_reentrant)
        with pytest.raises(gr.errors.RouteError):
            first.backward()


@both_modes
def test_a_route_ended_by_an_exception_is_closed_for_backward_too(use_reentrant: bool) -> None:
    model = routed_tower()
    with pytest.raises(KeyError), gr.route(model, FIRST):
        loss = loss_of(model, use_reentrant)
        raise KeyError
    with pytest.raises(gr.errors.RouteError):
        loss.backward()


@both_modes
def test_scoring_under_a_route_and_discarded_losses_raise_no_alarm_later(use_reentrant: bool) -> None:
    model = routed_tower()
    with torch.no_grad(), gr.route(model, FIRST):
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
    with pytest.raises(gr.errors.RouteError, match="not torch.utils.checkpoint"), gr.route(model, FIRST):
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
