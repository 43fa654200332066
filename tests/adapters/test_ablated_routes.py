"""A mask that is ablated away raises; a view that a layer was passed by raises; both where nothing was lost do not."""

from collections.abc import Callable

import pytest
import torch
from support.models import gradients, randomize_blocks, routed_tower
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradroute as gr

pytestmark = pytest.mark.touches_peft

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
ZONES = ["keep", "absorb", "route", "keep"]


def trained(model: nn.Module, zones: list[str], **ablation: object) -> None:
    with gr.ablate_quarantine(model, **ablation), gr.route(model, gr.RouteMask.zones(zones)):
        model(X).sum().backward()


@pytest.mark.parametrize("zone", ["absorb", "route"])
def test_rows_that_train_an_ablated_quarantine_raise(zone: str) -> None:
    model = routed_tower()
    with pytest.raises(gr.errors.RouteError, match="train the quarantine should not be ablated.*`lower`"):
        trained(model, [zone, "keep", "keep", "keep"])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.corner("rows that train the quarantine run ablated", "`RouteError`")
def test_an_ablation_inside_a_route_raises_too() -> None:
    model = routed_tower()
    with pytest.raises(gr.errors.RouteError, match="should not be ablated"):
        with gr.route(model, gr.RouteMask.zones(ZONES)), gr.ablate_quarantine(model):
            model(X).sum().backward()


def test_nested_partial_ablations_that_come_to_nothing_raise() -> None:
    model = routed_tower()
    with pytest.raises(gr.errors.RouteError, match="should not be ablated"), gr.ablate_quarantine(model, 0.5):
        trained(model, ZONES)


@pytest.mark.parametrize("ablated", [[True, False, False, False], [True, False, False, True]])
def test_ablated_rows_that_do_not_train_the_quarantine_lose_nothing(ablated: list[bool]) -> None:
    model, plain = routed_tower(), routed_tower()
    trained(model, ZONES, rows=torch.tensor(ablated))
    with gr.route(plain, gr.RouteMask.zones(ZONES)):
        plain(X).sum().backward()
    expected = gradients(plain)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12)


def test_one_ablated_row_that_trains_the_quarantine_raises() -> None:
    with pytest.raises(gr.errors.RouteError, match="should not be ablated"):
        trained(routed_tower(), ZONES, rows=torch.tensor([True, True, False, False]))
    tokens = torch.zeros(4, 3, dtype=torch.bool)
    tokens[2, 1] = True
    model = routed_tower()
    with pytest.raises(gr.errors.RouteError, match="should not be ablated"), gr.ablate_quarantine(model, rows=tokens):
        with gr.route(model, gr.RouteMask.zones(ZONES)):
            model(X[:, None].expand(4, 3, 5))


def test_a_route_of_keep_alone_may_be_ablated() -> None:
    model = routed_tower()
    trained(model, ["keep"] * 4)
    assert all(p.grad.abs().sum() > 0 for _, p in gr.deployed_parameters(model))


def test_a_quarantine_scaled_in_part_still_trains() -> None:
    model = routed_tower()
    trained(model, ZONES, scale=0.5)
    assert all(p.grad.abs().sum() > 0 for _, p in gr.quarantine_parameters(model))


@pytest.mark.parametrize(("m", "g_q"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_mask_under_which_the_quarantine_does_not_run_or_learn_has_nothing_to_lose(m: float, g_q: float) -> None:
    model, plain = routed_tower(), routed_tower()
    mask = gr.RouteMask.weights(m=torch.full((4,), m), g_d=1.0, g_q=g_q)
    with gr.ablate_quarantine(model), gr.route(model, mask):
        model(X).sum().backward()
    with gr.route(plain, gr.RouteMask.weights(m=torch.zeros(4), g_d=1.0, g_q=g_q)):
        plain(X).sum().backward()
    assert not any(p.grad.any() for _, p in gr.quarantine_parameters(model))
    for name, parameter in gr.deployed_parameters(plain):
        torch.testing.assert_close(dict(gr.deployed_parameters(model))[name].grad, parameter.grad, rtol=0, atol=1e-12)


def test_an_ablated_pass_without_gradients_is_allowed_under_any_route() -> None:
    model, mask = routed_tower(), gr.RouteMask.zones(ZONES)
    with torch.no_grad(), gr.ablate_quarantine(model):
        ablated = model(X)
    with gr.route(model, mask):
        with torch.no_grad(), gr.ablate_quarantine(model):
            torch.testing.assert_close(model(X), ablated, rtol=0, atol=1e-12)
        routed = model(X)
        routed.sum().backward()
    assert not torch.allclose(routed, ablated)
    assert all(p.grad.any() for _, p in gr.quarantine_parameters(model))
    with torch.no_grad(), gr.ablate_quarantine(model), gr.route(model, mask):
        torch.testing.assert_close(model(X), ablated, rtol=0, atol=1e-12)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_an_ablated_route_raises_under_checkpointing(use_reentrant: bool) -> None:
    model = routed_tower()
    with pytest.raises(gr.errors.RouteError, match="should not be ablated"):
        with gr.ablate_quarantine(model), gr.route(model, gr.RouteMask.zones(ZONES)):
            x = X.clone().requires_grad_()
            checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()


VIEWS = {"ablated": gr.ablate_quarantine, "disabled": gr.disable_adapters}


@pytest.mark.corner("in a view, a patched forward bypasses a routed layer", "`RouteError`")
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_layer_that_is_passed_by_in_a_view_raises(view: Callable[[nn.Module], object]) -> None:
    model = routed_tower()
    upper = model.upper

    def fused(x: Tensor) -> Tensor:
        # As kernels do that are patched onto an instance: both blocks, whatever the view.
        (A_d, B_d, s_d), (A_q, B_q, s_q) = upper.deployed, upper.quarantine
        return upper.base_layer(x) + s_d * x @ A_d.T @ B_d.T + s_q * x @ A_q.T @ B_q.T

    with view(model):
        expected = model(X)
    upper.forward = fused
    with pytest.raises(gr.errors.RouteError, match="1 of 2 that did not run: `upper`"), view(model):
        passed_by = model(X)
    assert not torch.allclose(passed_by, expected)
    del upper.forward
    with view(model):
        assert torch.equal(model(X), expected)


def test_an_exception_is_not_covered_by_the_layers_that_did_not_run() -> None:
    model = routed_tower()
    with pytest.raises(KeyError), gr.ablate_quarantine(model):
        model.lower(X)
        raise KeyError


def test_a_forward_that_raised_did_not_run() -> None:
    model, rows = routed_tower(), torch.tensor([True, False, True])
    with gr.ablate_quarantine(model, rows=rows), pytest.raises(gr.errors.RouteError, match="leading axes"):
        model(X)
    with pytest.raises(gr.errors.RouteError, match="2 of 2 .* did not run"):
        with gr.route(model, gr.RouteMask.zones(ZONES[:3])), pytest.raises(gr.errors.RouteError, match="leading axes"):
            model(X)


def test_a_view_in_which_nothing_ran_or_only_the_module_that_was_passed_is_fine() -> None:
    model = routed_tower()
    with torch.no_grad():
        on = model.lower(X)
        with gr.ablate_quarantine(model):
            pass
        with gr.ablate_quarantine(model.lower):
            assert not torch.allclose(model.lower(X), on)
        assert torch.equal(model.lower(X), on)


def test_what_ran_in_an_inner_view_ran_in_the_outer_one() -> None:
    model = routed_tower()
    with gr.ablate_quarantine(model, 0.5):
        model.lower(X)
        with gr.ablate_quarantine(model):
            model(X)
    with pytest.raises(gr.errors.RouteError, match="`lower`"), gr.ablate_quarantine(model):
        with gr.ablate_quarantine(model.upper):
            model.upper(torch.randn(4, 6, dtype=torch.float64))


@pytest.mark.corner("an expert gets no token in a view", "no error: an expert may be idle")
def test_an_expert_may_get_no_token() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(5, 5), "experts": nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])})
    randomize_blocks(gr.attach(model, r=2))
    with torch.no_grad(), gr.ablate_quarantine(model):
        ablated = model["experts"][0](model["gate"](X.float()))
    with pytest.raises(gr.errors.RouteError, match="`gate`"), torch.no_grad(), gr.ablate_quarantine(model):
        model["experts"][0](X.float())
    with torch.no_grad():
        assert not torch.allclose(model["experts"][0](model["gate"](X.float())), ablated)
