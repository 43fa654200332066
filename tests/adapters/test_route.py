"""Routing a model: exact gradients, zero where zero is due, and every way a mask could go unused."""

import pytest
import torch
from support.models import gradients, reference_gradients, routed_tower
from torch import Tensor, nn

import gradroute as gr
from gradroute.adapters.views import without_route

pytestmark = pytest.mark.touches_peft

N = 6
ZONES = ["keep", "absorb", "route", "route", "keep", "absorb"]


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, 4, generator=generator, dtype=torch.float64)


def routed_backward(model: nn.Module, mask: gr.RouteMask | None, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    if mask is None:
        (model(x) * upstream).sum().backward()
    else:
        with gr.route(model, mask):
            (model(x) * upstream).sum().backward()
    return gradients(model)


def masks() -> dict[str, gr.RouteMask]:
    generator = torch.Generator().manual_seed(5)
    return {
        "zones": gr.RouteMask.zones(ZONES),
        "soft": gr.RouteMask.weights(*torch.rand(3, N, generator=generator, dtype=torch.float64)),
        "negative": gr.RouteMask.weights(*torch.randn(3, N, generator=generator, dtype=torch.float64)),
    }


@pytest.mark.parametrize("kind", ["zones", "soft", "negative"])
def test_one_pass_through_a_tower_equals_row_by_row_passes(kind: str) -> None:
    model, (x, upstream), mask = routed_tower(), batch(), masks()[kind]
    routed = routed_backward(model, mask, x, upstream)
    expected = reference_gradients(model, x, upstream, mask.m.double(), mask.g_d.double(), mask.g_q.double())
    assert routed.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(routed[name], expected[name], rtol=1e-12, atol=1e-12)
    plain = routed_backward(model, None, x, upstream)
    assert all(not torch.allclose(routed[name], plain[name]) for name in expected)


def test_branch_detaching_gives_lower_layers_another_gradient() -> None:
    (x, upstream), mask = batch(), gr.RouteMask.zones(ZONES)
    exact = routed_backward(routed_tower(), mask, x, upstream)
    branch = routed_backward(routed_tower(stop_gradient="branch"), mask, x, upstream)
    difference = (exact["lower.lora_B_quarantine"] - branch["lower.lora_B_quarantine"]).norm()
    assert difference > 0.02 * exact["lower.lora_B_quarantine"].norm()
    torch.testing.assert_close(exact["upper.lora_B"], branch["upper.lora_B"])


def test_a_mixed_batch_is_the_sum_of_its_rows() -> None:
    model, (x, upstream), mask = routed_tower(), batch(), gr.RouteMask.zones(ZONES)
    mixed = routed_backward(model, mask, x, upstream)
    solo: dict[str, Tensor] = {}
    for i in range(N):
        for name, gradient in routed_backward(model, mask[i : i + 1], x[i : i + 1], upstream[i : i + 1]).items():
            solo[name] = solo.get(name, 0) + gradient
    for name in mixed:
        torch.testing.assert_close(mixed[name], solo[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("zone", "untouched"), [("keep", "quarantine"), ("route", "deployed")])
def test_a_zone_leaves_the_other_block_at_exactly_zero(zone: str, untouched: str) -> None:
    model, (x, upstream) = routed_tower(), batch()
    routed_backward(model, gr.RouteMask.zones([zone] * N), x, upstream)
    blocks = {"deployed": gr.deployed_parameters(model), "quarantine": gr.quarantine_parameters(model)}
    for _, parameter in blocks.pop(untouched):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    (trained,) = blocks.values()
    assert all(parameter.grad.abs().sum() > 0 for _, parameter in trained)


def test_keep_rows_do_not_see_the_quarantine_in_the_forward() -> None:
    model, (x, _) = routed_tower(), batch()
    with gr.route(model, gr.RouteMask.zones(ZONES)):
        routed = model(x)
    on = model(x)
    with gr.ablate_quarantine(model):
        ablated = model(x)
    keep = torch.tensor([zone == "keep" for zone in ZONES])
    assert not torch.allclose(on, ablated)
    torch.testing.assert_close(routed[keep], ablated[keep])
    torch.testing.assert_close(routed[~keep], on[~keep])


def test_no_route_is_absorb() -> None:
    model, (x, upstream) = routed_tower(), batch()
    absorbed = routed_backward(model, gr.RouteMask.zones(["absorb"] * N), x, upstream)
    plain = routed_backward(model, None, x, upstream)
    assert all(torch.equal(absorbed[name], plain[name]) for name in plain)


def test_per_row_per_token_and_packed_masks_agree() -> None:
    model = routed_tower()
    x, upstream = batch(12)
    zones = torch.tensor([0, 1, 2])
    rows = routed_backward(model, gr.RouteMask.zones(zones), x.view(3, 4, 5), upstream.view(3, 4, 4))
    tokens = gr.RouteMask.zones(zones[:, None].expand(3, 4))
    assert tokens.shape == (3, 4)
    per_token = routed_backward(model, tokens, x.view(3, 4, 5), upstream.view(3, 4, 4))
    packed = gr.RouteMask.zones(zones.repeat_interleave(4)[None])
    per_packed_token = routed_backward(model, packed, x.view(1, 12, 5), upstream.view(1, 12, 4))
    for name in rows:
        torch.testing.assert_close(per_token[name], rows[name], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(per_packed_token[name], rows[name], rtol=1e-12, atol=1e-12)


@pytest.mark.corner(
    "the route is closed before backward, without checkpointing", "exact: the masks are saved in the graph"
)
def test_closing_the_route_before_backward_is_exact() -> None:
    model, (x, upstream), mask = routed_tower(), batch(), gr.RouteMask.zones(ZONES)
    inside = routed_backward(model, mask, x, upstream)
    model.zero_grad()
    with gr.route(model, mask):
        loss = (model(x) * upstream).sum()
    loss.backward()
    assert all(torch.equal(inside[name], gradient) for name, gradient in gradients(model).items())


@pytest.mark.corner("two routed forwards before one backward", "exact: each forward keeps its mask")
def test_two_routed_forwards_before_one_backward_keep_their_own_masks() -> None:
    model, (x, upstream) = routed_tower(), batch()
    first, second = gr.RouteMask.zones(ZONES), gr.RouteMask.zones(ZONES[::-1])
    separate = [routed_backward(model, mask, x, upstream) for mask in (first, second)]
    model.zero_grad()
    losses = []
    for mask in (first, second):
        with gr.route(model, mask):
            losses.append((model(x) * upstream).sum())
    sum(losses).backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, separate[0][name] + separate[1][name], rtol=1e-12, atol=1e-12)


def test_routes_nest_and_the_outer_one_comes_back() -> None:
    model, (x, _) = routed_tower(), batch()
    keep, absorb = gr.RouteMask.zones(["keep"] * N), gr.RouteMask.zones(["absorb"] * N)
    with gr.route(model, keep):
        outer = model(x)
        with gr.route(model, absorb):
            inner = model(x)
        again = model(x)
    assert torch.equal(outer, again)
    assert not torch.allclose(outer, inner)
    assert torch.equal(model(x), inner)


def test_a_route_ends_with_an_exception() -> None:
    model, (x, _) = routed_tower(), batch()
    before = model(x)
    with pytest.raises(KeyError), gr.route(model, gr.RouteMask.zones(["keep"] * N)):
        assert not torch.allclose(model(x), before)
        raise KeyError
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("shape", "zones", "message"),
    [
        ((6, 5), ["keep"] * 5, r"\(5,\).*\(6,\).*`lower`.*one row per sequence"),
        ((2, 3, 5), [["keep"] * 2] * 2, r"\(2, 2\).*\(2, 3\).*`lower`"),
        ((1, 6, 5), ["keep"] * 6, r"\(6,\).*\(1, 6\).*packed inputs take a mask of shape \(1, 6\)"),
        ((6, 5), [["keep"] * 3] * 2, r"\(2, 3\).*\(6,\).*flattens its tokens"),
    ],
)
def test_a_mask_that_does_not_fit_the_batch_raises(shape: tuple[int, ...], zones: list[str], message: str) -> None:
    model = routed_tower()
    with pytest.raises(gr.errors.RouteError, match=message), gr.route(model, gr.RouteMask.zones(zones)):
        model(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.corner(
    "a targeted layer does not run under the route", "`RouteError` at the end of the block, naming the layers"
)
def test_a_layer_that_did_not_run_raises_at_exit() -> None:
    model, (x, _) = routed_tower(), batch()
    with pytest.raises(gr.errors.RouteError, match="1 of 2 routed layers did not run.*`upper`"):
        with gr.route(model, gr.RouteMask.zones(ZONES)):
            model.lower(x)
    assert not model.upper.has_open_route


@pytest.mark.corner("logits from before the route, backward inside it", "`RouteError`")
@pytest.mark.corner("only backward is inside the route, the forward was before it", "`RouteError`")
def test_a_backward_of_a_forward_without_a_route_raises_inside_one() -> None:
    model, (x, _), mask = routed_tower(), batch(), gr.RouteMask.zones(ZONES)
    loss = model(x).sum()
    with pytest.raises(gr.errors.RouteError, match="`upper` ran without a route and its backward runs inside one"):
        with gr.route(model, mask):
            model(x)
            loss.backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.corner("only a reference pass under `no_grad` runs inside a route", "`RouteError`")
def test_a_reference_pass_without_gradients_does_not_count_as_running() -> None:
    model, (x, _), mask = routed_tower(), batch(), gr.RouteMask.zones(ZONES)
    for without_gradients in (torch.no_grad, torch.inference_mode):
        with pytest.raises(gr.errors.RouteError, match="2 of 2 .* did not run inside the route with gradients"):
            with gr.route(model, mask), without_gradients():
                model(x)
        with gr.route(model, mask):
            with without_gradients():
                model(x)
            model(x)


def test_logits_of_before_with_a_reference_pass_inside_train_nothing() -> None:
    model, (x, _) = routed_tower(), batch()
    logits = model(x)
    with pytest.raises(gr.errors.RouteError), gr.route(model, gr.RouteMask.zones(["route"] * N)):
        with torch.no_grad():
            model(x)
        logits.sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_route_opened_without_gradients_is_for_its_forward() -> None:
    model, (x, _), mask = routed_tower(), batch(), gr.RouteMask.zones(ZONES)
    with gr.route(model, mask):
        routed = model(x)
    with torch.no_grad(), gr.route(model, mask):
        assert torch.equal(model(x), routed)
    with pytest.raises(gr.errors.RouteError, match="did not run"), torch.no_grad(), gr.route(model, mask):
        pass


def test_a_loss_of_another_model_may_run_backward_inside_a_route() -> None:
    model, other, (x, upstream), mask = routed_tower(), nn.Linear(5, 1), batch(), gr.RouteMask.zones(ZONES)
    expected = routed_backward(model, mask, x, upstream)
    model.zero_grad()
    before = other(x.float()).sum()
    with gr.route(model, mask):
        (model(x) * upstream).sum().backward()
        before.backward()
    assert all(torch.equal(expected[name], gradient) for name, gradient in gradients(model).items())


def test_other_rows_run_while_a_route_is_suspended_and_do_not_count() -> None:
    model, (x, _), mask = routed_tower(), batch(), gr.RouteMask.zones(ZONES)
    with gr.route(model, mask):
        model(x)
        with without_route(model):
            model(x[:2]).sum().backward()
    with pytest.raises(gr.errors.RouteError, match="did not run"), gr.route(model, mask), without_route(model):
        model(x[:2])


@pytest.mark.corner(
    "the only forward under the route has the adapters disabled", "`RouteError`: a reference pass is no routed forward"
)
def test_a_reference_pass_with_adapters_off_does_not_count_as_running() -> None:
    model, (x, _) = routed_tower(), batch()
    with pytest.raises(gr.errors.RouteError, match="did not run"), gr.route(model, gr.RouteMask.zones(ZONES)):
        with gr.disable_adapters(model):
            model(x)


def test_route_takes_a_mask_and_a_routed_model_only() -> None:
    with pytest.raises((gr.errors.RouteError, TypeError)), gr.route(routed_tower(), [True]):
        pass
    with pytest.raises(gr.GradRouteError, match="Linear"), gr.route(nn.Linear(2, 2), gr.RouteMask.zones(ZONES)):
        pass


def test_a_sticky_route_holds_until_it_is_cleared() -> None:
    model, (x, upstream), mask = routed_tower(), batch(), gr.RouteMask.zones(ZONES)
    expected = routed_backward(model, mask, x, upstream)
    plain = model(x)
    model.zero_grad()
    gr.adapters.set_route(model, mask)
    (model(x) * upstream).sum().backward()
    assert not torch.allclose(model(x), plain)
    gr.adapters.clear_route(model)
    assert all(torch.equal(expected[name], gradient) for name, gradient in gradients(model).items())
    assert torch.equal(model(x), plain)


def test_a_sticky_route_that_never_ran_raises_when_it_is_cleared_or_replaced() -> None:
    model, (x, _), mask = routed_tower(), batch(), gr.RouteMask.zones(ZONES)
    gr.adapters.set_route(model, mask)
    with pytest.raises(gr.errors.RouteError, match="did not run"):
        gr.adapters.clear_route(model)
    gr.adapters.set_route(model, mask)
    with pytest.raises(gr.errors.RouteError, match="did not run"):
        gr.adapters.set_route(model, mask)
    gr.adapters.set_route(model, mask)
    model(x)
    gr.adapters.set_route(model, mask)
    model(x)
    gr.adapters.clear_route(model)


def test_what_ran_in_an_inner_route_did_not_run_in_the_outer_one() -> None:
    model, (x, _), mask = routed_tower(), batch(), gr.RouteMask.zones(ZONES)
    with pytest.raises(gr.errors.RouteError, match="did not run"), gr.route(model, mask):
        with gr.route(model, gr.RouteMask.zones(["keep"] * len(mask))):
            model(x)


def test_clearing_without_a_route_and_mixing_sticky_with_blocks_raise() -> None:
    model, (x, _), mask = routed_tower(), batch(), gr.RouteMask.zones(ZONES)
    with pytest.raises(gr.errors.RouteError, match="no route to clear"):
        gr.adapters.clear_route(model)
    with gr.route(model, mask):
        model(x)
        for call in (lambda: gr.adapters.set_route(model, mask), lambda: gr.adapters.clear_route(model)):
            with pytest.raises(gr.errors.RouteError, match="inside a `with route"):
                call()


def test_zones_are_filled_in_with_the_gradients_that_multiplying_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, upstream) = routed_tower(), batch()
    mask = gr.RouteMask.zones(ZONES)
    assert mask.is_binary
    assert not masks()["soft"].is_binary
    assert not gr.RouteMask.weights(m=1.0, g_d=torch.tensor([0.0, 1, 2]), g_q=1.0).is_binary
    filled = routed_backward(model, mask, x, upstream)
    monkeypatch.setattr(gr.RouteMask, "is_binary", False)
    multiplied = routed_backward(model, mask, x, upstream)
    unrouted = routed_backward(model, None, x, upstream)
    for name, gradient in filled.items():
        assert torch.equal(gradient, multiplied[name])
    assert any(not torch.equal(filled[name], unrouted[name]) for name in filled)


def test_a_view_in_part_under_zones_is_multiplied_with() -> None:
    model, (x, _) = routed_tower(), batch()
    mask = gr.RouteMask.zones(["absorb"] * N)
    with torch.no_grad():
        with gr.route(model, mask):
            on = model(x)
        with gr.ablate_quarantine(model, scale=0.5), gr.route(model, mask):
            half = model(x)
        with gr.ablate_quarantine(model, rows=torch.arange(N) < 2), gr.route(model, mask):
            rows = model(x)
        with gr.ablate_quarantine(model), gr.route(model, mask):
            off = model(x)
    assert not torch.equal(on, off)
    assert not torch.equal(half, on)
    assert not torch.equal(half, off)
    torch.testing.assert_close(rows[:2], off[:2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows[2:], on[2:], rtol=1e-12, atol=1e-12)


def test_weights_that_are_written_into_a_mask_are_multiplied_with() -> None:
    model, (x, upstream) = routed_tower(), batch()
    mask = gr.RouteMask.zones(ZONES)
    before = routed_backward(model, mask, x, upstream)
    mask.g_d[1], mask.m[2] = 0.25, 0.5
    assert not mask.is_binary
    written = routed_backward(model, mask, x, upstream)
    expected = routed_backward(model, gr.RouteMask.weights(mask.m, mask.g_d, mask.g_q), x, upstream)
    assert any(not torch.equal(before[name], written[name]) for name in before)
    for name, gradient in written.items():
        assert torch.equal(gradient, expected[name])
