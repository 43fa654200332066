"""Erase and route v1: what projecting a gradient of gains must leave true.

    c = V g;   c_use = relu(c) | c | 2c;   removed = overshoot * c_use V;   kept = g - removed
    erase: g <- kept;      route: g <- kept, and `removed` is the gradient of a second gain, zeroed at deployment

Source: grpo_proj2 (wassname), prior-art formula 7. That erasing equals the formula, conserves in every dtype and moves
what it removes is in test_filters.py; here is what follows from it, on gains of r = 4 in float64.
"""

from collections.abc import Iterator

import pytest
import torch
from support.gradient_directions import deployed_rows, directions_of, drawn_directions
from support.models import Tower, randomize_blocks
from torch import Tensor, nn

import gradroute as gr
from gradroute._protocol import routed_layers
from gradroute.adapters.svd_gain import SvdGain

ROUNDING = 1e-13
SIDES = ["one", "two", "reverse"]
PUBLISHED = gr.RouteMask.weights(m=1.0, g_d=torch.ones(7), g_q=0.0)


def gain_tower(*, at_start: bool = False) -> Tower:
    torch.manual_seed(0)
    model = Tower().double()
    gr.attach(model, r=4, lora_alpha=4.0, parametrization="svd_gain")
    return model if at_start else randomize_blocks(model)  # type: ignore[return-value]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(7, width, generator=generator, dtype=torch.float64) for width in (5, 4))  # type: ignore[return-value]


def backward(model: nn.Module) -> nn.Module:
    """The published scheme: the second gain is in the forward and gets no gradient of its own."""
    x, upstream = batch()
    with gr.route(model, PUBLISHED):
        (model(x) * upstream).sum().backward()
    return model


def project(
    model: nn.Module, directions: gr.Directions, mode: str = "erase", **settings: object
) -> gr.filters.FilterStats:
    return gr.apply_filter(model, gr.ProjectionFilter(directions, mode=mode, **settings))  # type: ignore[arg-type]


def layers_of(model: nn.Module) -> Iterator[tuple[str, SvdGain]]:
    for name, layer in routed_layers(model).items():
        assert isinstance(layer, SvdGain)
        yield name, layer


def hackward(model: nn.Module, directions: gr.Directions) -> Tensor:
    """c = V g of all modules, one after the other."""
    return torch.cat([directions.rows[name] @ g for name, g in deployed_rows(model).items()])


def both_signs(signs: tuple[float, ...] = (1.0, -1.0, 1.0)) -> gr.Directions:
    """Random rows, each turned so that c has the sign given for it, in all modules."""
    model = backward(gain_tower())
    drawn = drawn_directions(model, len(signs))
    rows = {}
    for name, g in deployed_rows(model).items():
        V = drawn.rows[name]
        rows[name] = V * (torch.sign(V @ g) * torch.tensor(signs, dtype=torch.float64))[:, None]
    return directions_of(rows, model)


@pytest.mark.parametrize("side", SIDES)
def test_what_is_left_along_the_directions(side: str) -> None:
    """V kept = min(c, 0) one-sided, 0 two-sided, -c reversed; nothing across the directions changes."""
    directions, model = both_signs(), backward(gain_tower())
    before, c = deployed_rows(model), hackward(model, directions)
    project(model, directions, side=side)
    expected = {"one": c.clamp(max=0), "two": torch.zeros_like(c), "reverse": -c}[side]
    left = hackward(model, directions)
    torch.testing.assert_close(left, expected, rtol=0, atol=ROUNDING)
    c_use = {"one": left.clamp(min=0), "two": left}
    assert side == "reverse" or c_use[side].abs().max() < ROUNDING
    for name, g in deployed_rows(model).items():
        V = directions.rows[name]
        across = torch.eye(4, dtype=torch.float64) - V.T @ V
        torch.testing.assert_close(across @ g, across @ before[name], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("overshoot", [0.5, 1.0, 1.7])
def test_overshoot_leaves_one_minus_overshoot_of_what_was_hackward(overshoot: float) -> None:
    directions, model = both_signs(), backward(gain_tower())
    c = hackward(model, directions)
    project(model, directions, overshoot=overshoot)
    expected = torch.where(c > 0, (1 - overshoot) * c, c)
    torch.testing.assert_close(hackward(model, directions), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("side", SIDES)
def test_erasing_twice_changes_nothing_more_and_reversing_twice_restores(side: str) -> None:
    """A projection is idempotent; `reverse` is a reflection, its own inverse."""
    directions, model = both_signs(), backward(gain_tower())
    original = deployed_rows(model)
    project(model, directions, side=side)
    once = deployed_rows(model)
    stats = project(model, directions, side=side)
    expected = original if side == "reverse" else once
    for name, g in deployed_rows(model).items():
        assert not torch.allclose(once[name], original[name])
        torch.testing.assert_close(g, expected[name], rtol=0, atol=ROUNDING)
    assert side == "reverse" or stats.cin < ROUNDING


@pytest.mark.parametrize("side", ["one", "two"])
def test_kept_and_removed_are_orthogonal_so_that_their_squares_add_up(side: str) -> None:
    """|kept|^2 = (1 - cin^2) |g|^2: erasing only ever shortens, reversing keeps the length."""
    directions, model = both_signs(), backward(gain_tower())
    before = deployed_rows(model)
    stats = project(model, directions, side=side)
    for name, kept in deployed_rows(model).items():
        g, cin = before[name], stats.modules[name].cin
        assert 0 < cin < 1
        assert torch.dot(kept, g - kept).abs() < ROUNDING
        assert kept.norm() ** 2 == pytest.approx(float((1 - cin**2) * g.norm() ** 2), rel=1e-12)
    reversed_model = backward(gain_tower())
    project(reversed_model, directions, side="reverse")
    for name, reflected in deployed_rows(reversed_model).items():
        assert reflected.norm().item() == pytest.approx(before[name].norm().item(), rel=1e-12)


@pytest.mark.parametrize("overshoot", [1.0, 1.7])
@pytest.mark.parametrize("side", SIDES)
def test_route_conserves_the_sum_of_both_gains_gradients_and_erase_loses_it(side: str, overshoot: float) -> None:
    directions = both_signs()
    unfiltered, erased, routed = (backward(gain_tower()) for _ in range(3))
    project(erased, directions, side=side, overshoot=overshoot)
    project(routed, directions, "route", side=side, overshoot=overshoot)
    for (_, a), (_, b), (_, c) in zip(*map(layers_of, (unfiltered, erased, routed)), strict=True):
        assert not a.gain_quarantine.grad.any()
        assert torch.equal(b.gain.grad, c.gain.grad)
        sums = [layer.gain.grad + layer.gain_quarantine.grad for layer in (a, b, c)]
        torch.testing.assert_close(sums[2], sums[0], rtol=0, atol=ROUNDING)
        assert not torch.allclose(sums[1], sums[0])


def test_a_gradient_without_a_hackward_part_is_left_alone_bitwise() -> None:
    model = backward(gain_tower())
    before = deployed_rows(model)
    stats = project(model, both_signs((-1.0, -1.0, -1.0)))
    assert stats.cin == 0
    assert stats.fired == 0
    assert all(torch.equal(g, before[name]) for name, g in deployed_rows(model).items())


def test_from_the_start_a_routed_step_is_a_plain_step_on_and_an_erased_step_ablated() -> None:
    """Both gains scale the same axes: on, their sum moves as one plain gain would, to first order; ablated it is erase.

    tanh a + tanh b - tanh (a + b) is of third order from gains of zero: what is left shrinks with lr^3.
    """
    x, _ = batch()
    steps: dict[str, list[Tensor]] = {"on": [], "ablated": [], "plain": [], "erased": []}
    directions = drawn_directions(gain_tower(), 3)
    for lr in (1e-3, 1e-4):
        for kind, mode in (("plain", "measure"), ("erased", "erase"), ("on", "route")):
            model = backward(gain_tower(at_start=True))
            project(model, directions, mode, **({} if mode == "measure" else {"side": "two"}))
            trained = [p for _, layer in layers_of(model) for p in (layer.gain, layer.gain_quarantine)]
            torch.optim.SGD(trained, lr=lr).step()
            with torch.no_grad():
                steps[kind].append(model(x))
                if kind == "on":
                    with gr.ablate_quarantine(model):
                        steps["ablated"].append(model(x))
    for i in range(2):
        assert torch.equal(steps["ablated"][i], steps["erased"][i])
        moved = (steps["plain"][i] - steps["erased"][i]).norm()
        assert (steps["on"][i] - steps["plain"][i]).norm() < 0.05 * moved
    errors = [float((steps["on"][i] - steps["plain"][i]).norm()) for i in range(2)]
    assert errors[0] / errors[1] == pytest.approx(1000, rel=0.1)
