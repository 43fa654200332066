"""Views: ablation (full, partial, per row) and adapters off; they nest, restore, and write nothing."""

from collections.abc import Iterator

import pytest
import torch
from support.models import gradients, randomize_blocks, reference_forward, routed_tower
from torch import Tensor, nn

import gradroute as gr
from gradroute._protocol import routed_layers

pytestmark = pytest.mark.touches_peft

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def reference(model: nn.Module, m: float | Tensor) -> Tensor:
    m = torch.full((4,), m, dtype=torch.float64) if isinstance(m, float) else m
    return reference_forward(model.upper, torch.tanh(reference_forward(model.lower, X, m)), m)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0])
def test_ablation_scales_the_quarantine(scale: float, grad: bool) -> None:
    model = routed_tower()
    with torch.set_grad_enabled(grad), gr.ablate_quarantine(model, scale):
        output = model(X)
    torch.testing.assert_close(output, reference(model, scale), rtol=1e-12, atol=1e-12)
    assert torch.allclose(output, model(X)) == (scale == 1.0)


def test_ablation_of_some_rows() -> None:
    model, rows = routed_tower(), torch.tensor([True, False, False, True])
    with gr.ablate_quarantine(model, 0.25, rows=rows):
        output = model(X)
    torch.testing.assert_close(output, reference(model, torch.where(rows, 0.25, 1.0).double()), rtol=1e-12, atol=1e-12)
    on = model(X)
    torch.testing.assert_close(output[~rows], on[~rows])
    assert not torch.allclose(output[rows], on[rows])


def test_ablations_nest_and_multiply() -> None:
    model = routed_tower()
    rows = torch.tensor([True, False, False, True])
    with gr.ablate_quarantine(model, 0.5):
        half = model(X)
        with gr.ablate_quarantine(model, 0.5, rows=rows):
            torch.testing.assert_close(
                model(X), reference(model, torch.where(rows, 0.25, 0.5).double()), rtol=1e-12, atol=1e-12
            )
        with gr.ablate_quarantine(model):
            assert torch.allclose(model(X), reference(model, 0.0))
        assert torch.equal(model(X), half)


def test_per_row_and_per_token_ablations_combine() -> None:
    model = routed_tower()
    x = X.view(2, 2, 5)
    rows, tokens = torch.tensor([True, False]), torch.tensor([[False, True], [False, True]])
    with gr.ablate_quarantine(model, 0.5, rows=rows), gr.ablate_quarantine(model, 0.5, rows=tokens):
        output = model(x).view(4, 4)
    expected = torch.tensor([0.5, 0.25, 1.0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(output, reference(model, expected), rtol=1e-12, atol=1e-12)


def test_ablation_multiplies_the_mask_of_a_route() -> None:
    model = routed_tower()
    mask = gr.RouteMask.weights(torch.tensor([1.0, 0.5, 0.0, 1.0], dtype=torch.float64), 1.0, 1.0)
    with gr.route(model, mask), gr.ablate_quarantine(model, 0.5):
        output = model(X)
    torch.testing.assert_close(output, reference(model, 0.5 * mask.m), rtol=1e-12, atol=1e-12)


def test_ablated_quarantine_gets_zero_gradients_and_the_deployed_block_its_own() -> None:
    model = routed_tower()
    with gr.ablate_quarantine(model):
        model(X).sum().backward()
    ablated = gradients(model)
    for name, _ in gr.quarantine_parameters(model):
        assert torch.equal(ablated[name], torch.zeros_like(ablated[name]))
    assert all(ablated[name].abs().sum() > 0 for name, _ in gr.deployed_parameters(model))


def test_a_scale_is_exact_in_float64_also_after_a_float32_layer_of_the_same_shape() -> None:
    model = nn.ModuleList([nn.Linear(5, 4), nn.Linear(5, 4).double()])
    randomize_blocks(gr.attach(model, r=2))
    with gr.ablate_quarantine(model, 0.3):
        model[0](X.float())
        output = model[1](X)
    expected = reference_forward(model[1], X, torch.full((4,), 0.3, dtype=torch.float64))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_disabled_adapters_give_the_base_output_bitwise() -> None:
    model = routed_tower()
    with gr.disable_adapters(model):
        output = model(X)
    adapted = model(X)
    gr.detach(model)
    assert torch.equal(output, model(X))
    assert not torch.allclose(output, adapted)


@pytest.mark.parametrize("view", [gr.ablate_quarantine, gr.disable_adapters])
def test_a_view_changes_no_parameter_and_ends_with_an_exception(view: object) -> None:
    model = routed_tower()
    before, on = {n: p.clone() for n, p in model.state_dict().items()}, model(X)
    flags = [p.requires_grad for p in model.parameters()]
    versions = [p._version for p in model.parameters()]
    with pytest.raises(KeyError), view(model):
        inside = model(X)
        assert flags == [p.requires_grad for p in model.parameters()]
        assert versions == [p._version for p in model.parameters()]
        raise KeyError
    assert not torch.allclose(inside, on)
    assert torch.equal(model(X), on)
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert flags == [p.requires_grad for p in model.parameters()]


@pytest.mark.corner("an optimizer step inside an open ablation", "the view shows the new parameters")
def test_a_view_made_before_an_optimizer_step_shows_the_parameters_after_it() -> None:
    model = routed_tower()
    with gr.ablate_quarantine(model):
        before = model(X)
        with torch.no_grad():
            for _, parameter in gr.deployed_parameters(model):
                parameter.mul_(2)
        assert not torch.allclose(model(X), before)


def test_layers_say_which_view_they_show() -> None:
    model = routed_tower()
    assert model.lower.view == "on"
    with gr.ablate_quarantine(model):
        assert model.lower.view == "ablated"
    with gr.ablate_quarantine(model, 0.5):
        assert model.lower.view == "scaled 0.5"
    with gr.ablate_quarantine(model, rows=torch.tensor([True, False])):
        assert model.lower.view == "scaled by rows"
    with gr.disable_adapters(model):
        assert model.lower.view == "disabled"


@pytest.mark.parametrize("scale", [-0.1, 1.1, float("nan"), True])
def test_scale_outside_the_unit_interval_raises(scale: float) -> None:
    with pytest.raises((gr.errors.RouteError, TypeError)), gr.ablate_quarantine(routed_tower(), scale):
        pass


@pytest.mark.parametrize("rows", [torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), torch.ones(1, 1, 1).bool()])
def test_rows_must_be_booleans_per_row_or_token(rows: Tensor) -> None:
    with pytest.raises((gr.errors.RouteError, TypeError)), gr.ablate_quarantine(routed_tower(), rows=rows):
        pass


def test_nested_rows_of_different_batches_raise() -> None:
    model = routed_tower()
    with gr.ablate_quarantine(model, rows=torch.tensor([True])):
        with (
            pytest.raises(gr.errors.RouteError, match=r"\(1,\), \(4,\)"),
            gr.ablate_quarantine(model, rows=torch.ones(4).bool()),
        ):
            pass


@pytest.mark.corner("two views are not left in the reverse of the order in which they were entered", "`RouteError`")
def test_views_left_in_another_order_than_entered_raise() -> None:
    model = routed_tower()
    outer, inner = gr.ablate_quarantine(model), gr.ablate_quarantine(model, 0.5)
    outer.__enter__()
    inner.__enter__()
    with pytest.raises(gr.errors.RouteError, match="another order"):
        outer.__exit__(None, None, None)
    with pytest.raises(gr.errors.RouteError, match="another order"):
        inner.__exit__(None, None, None)
    assert all(layer.view == "on" for layer in routed_layers(model).values())


def test_a_view_that_a_closed_generator_ended_does_not_come_back_with_the_end_of_an_inner_block() -> None:
    model = routed_tower()

    def ablated() -> Iterator[None]:
        with gr.ablate_quarantine(model):
            yield

    generator = ablated()
    next(generator)
    with pytest.raises(gr.errors.RouteError), gr.ablate_quarantine(model, 0.5):
        with pytest.raises(gr.errors.RouteError, match="another order"):
            next(generator, None)
    assert all(layer.view == "on" for layer in routed_layers(model).values())


def test_bad_arguments_raise_before_the_block_is_entered() -> None:
    with pytest.raises((gr.errors.RouteError, TypeError)):
        gr.ablate_quarantine(routed_tower(), scale=7.0)
    with pytest.raises((gr.errors.RouteError, TypeError)):
        gr.route(routed_tower(), None)


def test_a_sticky_route_is_not_set_or_cleared_inside_a_view() -> None:
    model, mask = routed_tower(), gr.RouteMask.zones(["keep"] * 4)
    gr.adapters.set_route(model, mask)
    model(X)
    for view in (gr.ablate_quarantine(model), gr.disable_adapters(model)):
        with view:
            for call in (lambda: gr.adapters.set_route(model, mask), lambda: gr.adapters.clear_route(model)):
                with pytest.raises(gr.errors.RouteError, match="leave that block first"):
                    call()
    gr.adapters.clear_route(model)


def test_rows_that_do_not_fit_the_batch_raise() -> None:
    model = routed_tower()
    with pytest.raises(gr.errors.RouteError, match=r"ablation rows.*\(3,\).*\(4,\)"):
        with gr.ablate_quarantine(model, rows=torch.tensor([True, False, True])):
            model(X)


@pytest.mark.corner("rows are ablated in part, in float64 or under a bfloat16 default", "the scale is not rounded")
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float32])
def test_the_scale_of_ablated_rows_is_not_rounded_to_the_default_type(default: torch.dtype) -> None:
    model, rows = routed_tower(), torch.tensor([True, False, False, True])
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with gr.ablate_quarantine(model, 0.3, rows=rows):
            output = model(X)
    finally:
        torch.set_default_dtype(before)
    expected = reference(model, torch.where(rows, torch.tensor(0.3, dtype=torch.float64), 1.0))
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
