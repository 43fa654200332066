"""`ProjectionFilter`: the formulas, conservation, where the removed part goes, and arguments that contradict."""

import math

import pytest
import torch
from support.filtered_towers import backward, gains, layers_of, lora
from support.gradient_directions import (
    deployed_row,
    deployed_rows,
    directions_of,
    drawn_directions,
    quarantine_gradients,
)
from support.language_models import random_directions
from support.models import gradients

import gradroute as gr
from gradroute._protocol import routed_layers
from gradroute.errors import GradRouteError
from gradroute.filters import apply_filter
from gradroute.filters.projection import ProjectionFilter

MODELS = {"lora": lora, "gain": gains}
both_kinds = pytest.mark.parametrize("kind", MODELS)


def slow_removed(g: list[float], rows: list[list[float]], side: str, overshoot: float) -> list[float]:
    """The formula, number by number."""
    removed = [0.0] * len(g)
    for v in rows:
        c = sum(a * b for a, b in zip(v, g, strict=True))
        c_use = {"one": max(c, 0.0), "two": c, "reverse": 2 * c}[side]
        removed = [r + overshoot * c_use * a for r, a in zip(removed, v, strict=True)]
    return removed


# The formulas


@both_kinds
@pytest.mark.parametrize("side", ["one", "two", "reverse"])
@pytest.mark.parametrize(("k", "overshoot"), [(1, 1.0), (2, 1.0), (2, 1.7)])
def test_erasing_equals_the_formula(kind: str, side: str, k: int, overshoot: float) -> None:
    changed = 0
    for seed in range(6):
        model = MODELS[kind]()
        directions = drawn_directions(model, k, seed)
        before, others = deployed_rows(model), quarantine_gradients(model)
        objects = {name: p.grad for name, p in gr.deployed_parameters(model)}
        stats = apply_filter(model, ProjectionFilter(directions, mode="erase", side=side, overshoot=overshoot))
        for name, layer in routed_layers(model).items():
            removed = slow_removed(before[name].tolist(), directions.rows[name].tolist(), side, overshoot)
            expected = before[name] - torch.tensor(removed, dtype=torch.float64)
            torch.testing.assert_close(deployed_row(layer), expected, rtol=0, atol=1e-12)
            changed += not torch.equal(before[name], deployed_row(layer))
            V, g = directions.rows[name], before[name]
            cins = [(V @ t).clamp(min=0).norm() if side != "two" else (V @ t).norm() for t in (g, expected)]
            assert stats.modules[name].cin == pytest.approx(float(cins[0] / g.norm()), abs=1e-12)
            assert stats.modules[name].cout == pytest.approx(float(cins[1] / expected.norm()), abs=1e-12)
        assert all(p.grad is objects[name] for name, p in gr.deployed_parameters(model))
        assert all(torch.equal(a, b) for a, b in zip(others, quarantine_gradients(model), strict=True))
        assert stats.residual < 1e-15
    assert changed


def test_pooled_figures_are_those_of_all_modules_together() -> None:
    model = lora()
    directions = drawn_directions(model, 2)
    before = deployed_rows(model)
    stats = apply_filter(model, ProjectionFilter(directions, mode="erase", side="two"))
    total = math.sqrt(sum(float(g.square().sum()) for g in before.values()))
    hack = math.sqrt(sum(float((directions.rows[name] @ g).square().sum()) for name, g in before.items()))
    assert stats.cin == pytest.approx(hack / total, abs=1e-12)
    assert stats.cout < 1e-14 < stats.cin
    nulls = sum(float(g.square().sum()) * 2 / g.numel() for g in before.values())
    assert stats.null == pytest.approx(math.sqrt(nulls) / total, abs=1e-12)
    assert stats.fired == 1.0
    assert repr(stats).startswith(
        f"FilterStats(two-sided cin {stats.cin:.3f} -> 0.000 (random {stats.null:.3f}), fired"
    )
    assert "2 modules" in repr(stats)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "factor"), [("one", 2), ("two", 1)])
def test_random_directions_have_the_share_that_is_called_null(side: str, factor: int) -> None:
    squares, null = [], 0.0
    model = lora()
    for seed in range(500):
        stats = apply_filter(model, ProjectionFilter(drawn_directions(model, 5, seed), mode="measure", side=side))
        squares.append(stats.modules["lower"].cin ** 2)
        null = stats.modules["lower"].null
    d = 2 * 5 + 6 * 2
    assert null == pytest.approx(math.sqrt(5 / (factor * d)))
    assert sum(squares) / len(squares) == pytest.approx(null**2, rel=0.15)


@both_kinds
def test_measuring_changes_no_bit_and_reports_what_erasing_would_find(kind: str) -> None:
    model, other = MODELS[kind](), MODELS[kind]()
    directions = drawn_directions(model, 3, seed=1)
    before = gradients(model)
    measured = apply_filter(model, ProjectionFilter(directions, mode="measure"))
    erased = apply_filter(other, ProjectionFilter(directions, mode="erase"))
    assert all(torch.equal(g, before[name]) for name, g in gradients(model).items())
    assert measured.cin == erased.cin == measured.cout > erased.cout
    assert measured.fired == erased.fired
    assert 0 < erased.fired < 1


def test_one_sided_leaves_what_is_anti_hackward() -> None:
    model = lora()
    before = deployed_rows(model)
    against = directions_of({name: -(g / g.norm())[None] for name, g in before.items()}, model)
    stats = apply_filter(model, ProjectionFilter(against, mode="erase"))
    assert all(torch.equal(g, before[name]) for name, g in deployed_rows(model).items())
    assert (stats.cin, stats.fired) == (0.0, 0.0)
    backward(model)
    stats = apply_filter(model, ProjectionFilter(against, mode="erase", side="two"))
    assert all(g.norm() < 1e-12 for g in deployed_rows(model).values())
    assert stats.cin == pytest.approx(1.0)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_removed_and_kept_add_up_to_the_gradient(kind: str, dtype: torch.dtype) -> None:
    model = MODELS[kind](dtype)
    stats = apply_filter(model, ProjectionFilter(drawn_directions(model, 2), mode="erase", side="two", overshoot=1.3))
    assert stats.residual < torch.finfo(dtype).eps
    assert stats.cin > 0.01


# Keep


@both_kinds
@pytest.mark.parametrize("k", [1, 2])
def test_keeping_leaves_the_part_along_the_directions_alone(kind: str, k: int) -> None:
    model, other = MODELS[kind](), MODELS[kind]()
    directions = drawn_directions(model, k)
    before, others = deployed_rows(model), quarantine_gradients(model)
    stats = apply_filter(model, ProjectionFilter(directions, mode="keep", side="two"))
    erased = apply_filter(other, ProjectionFilter(directions, mode="erase", side="two"))
    complement = deployed_rows(other)
    for name, kept in deployed_rows(model).items():
        expected = slow_removed(before[name].tolist(), directions.rows[name].tolist(), "two", 1.0)
        torch.testing.assert_close(kept, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(kept + complement[name], before[name], rtol=0, atol=1e-12)
        assert kept.norm() > 1e-3
        assert complement[name].norm() > 1e-3
    assert stats.cin == pytest.approx(erased.cin, abs=1e-12)
    assert stats.cout == pytest.approx(1.0, abs=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(others, quarantine_gradients(model), strict=True))


def test_keeping_a_subspace_without_rows_is_refused() -> None:
    model = lora()
    directions = drawn_directions(model)
    del directions.rows[next(iter(directions.rows))]
    before = gradients(model)
    with pytest.raises(GradRouteError, match='should have a row in mode="keep"'):
        apply_filter(model, ProjectionFilter(directions, mode="keep", side="two"))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), gradients(model).values(), strict=True))


# Route


@pytest.mark.parametrize("r_quarantine", [3, 4])
def test_routing_moves_the_removed_part_into_the_gain_of_the_quarantine(r_quarantine: int) -> None:
    model = gains(r_quarantine=r_quarantine)
    directions = drawn_directions(model, 2)
    before = {name: (layer.gain.grad.clone(), layer.gain_quarantine.grad.clone()) for name, layer in layers_of(model)}
    stats = apply_filter(model, ProjectionFilter(directions, mode="route", side="two"))
    for name, layer in layers_of(model):
        g, own = before[name]
        removed = torch.zeros_like(own)
        removed[:3] = directions.rows[name].T @ (directions.rows[name] @ g)
        torch.testing.assert_close(layer.gain.grad, g - removed[:3], rtol=0, atol=1e-13)
        torch.testing.assert_close(layer.gain_quarantine.grad, own + removed, rtol=0, atol=1e-13)
        assert removed.any()
    assert stats.residual < 1e-15


def test_the_published_scheme_trains_the_quarantine_on_the_removed_part_alone() -> None:
    model = gains()
    model.zero_grad()
    with gr.route(model, gr.RouteMask.weights(m=1.0, g_d=torch.ones(7), g_q=0.0)):
        backward(model)
    before = {name: layer.gain.grad.clone() for name, layer in layers_of(model)}
    apply_filter(model, ProjectionFilter(drawn_directions(model), mode="route", side="two"))
    for name, layer in layers_of(model):
        assert layer.gain_quarantine.grad.any()
        torch.testing.assert_close(layer.gain.grad + layer.gain_quarantine.grad, before[name], rtol=0, atol=1e-14)


def test_in_bf16_what_rounding_left_in_the_kept_part_is_not_moved_as_well() -> None:
    compared = 0
    for seed in range(5):
        model = gains(torch.bfloat16)
        for _, layer in layers_of(model):
            layer.gain_quarantine.grad.zero_()
        before = {name: layer.gain.grad.double() for name, layer in layers_of(model)}
        apply_filter(model, ProjectionFilter(drawn_directions(model, seed=seed), mode="route", side="two"))
        for name, layer in layers_of(model):
            kept, moved = layer.gain.grad.double(), layer.gain_quarantine.grad.double()
            # Within a factor of two the difference of two floats is a float (Sterbenz), so that the sum is exact.
            ratio = kept / before[name]
            exact = (ratio >= 0.5) & (ratio <= 2) & (ratio != 1)
            assert torch.equal((kept + moved)[exact], before[name][exact])
            compared += int(exact.sum())
    assert compared > 5


@pytest.mark.parametrize("settings", [{"rotate": True}, {"r_quarantine": 2}])
def test_routing_into_other_axes_is_refused(settings: dict) -> None:
    model = gains(**settings)
    with pytest.raises(GradRouteError, match="rotate=False and r_quarantine >= r"):
        apply_filter(model, ProjectionFilter(drawn_directions(model), mode="route"))


def test_routing_between_lora_matrices_is_refused() -> None:
    model = lora()
    with pytest.raises(GradRouteError, match='mode="erase"'):
        apply_filter(model, ProjectionFilter(drawn_directions(model), mode="route"))


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "remove"}, '`mode` should be "measure"'),
        ({"mode": "erase", "side": "both"}, '`side` should be "one"'),
        ({"mode": "erase", "overshoot": 0}, "`overshoot` should be a positive"),
        ({"mode": "erase", "overshoot": math.inf}, "`overshoot` should be a positive"),
        ({"mode": "measure", "overshoot": 2.0}, "`overshoot` has no effect"),
        ({"mode": "keep", "side": "two", "overshoot": 2.0}, '`overshoot` has no effect in mode="keep"'),
        ({"mode": "keep"}, '`side` should be "two" in mode="keep"'),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(arguments: dict, message: str) -> None:
    # Not through beartype, which would refuse some of them with an error of its own.
    unchecked = getattr(ProjectionFilter.__init__, "__wrapped__", ProjectionFilter.__init__)
    with pytest.raises(GradRouteError, match=message):
        unchecked(object.__new__(ProjectionFilter), drawn_directions(lora()), **arguments)


def test_features_that_are_no_gradients_are_refused() -> None:
    directions = random_directions()
    directions.provenance = directions.provenance.__class__(
        **{**directions.provenance.__dict__, "feature": "output", "source": "gradient"}
    )
    with pytest.raises(GradRouteError, match='feature "parameter" or "bottleneck". Found \'output\''):
        ProjectionFilter(directions, mode="measure")


def test_repr_says_what_it_does() -> None:
    text = repr(ProjectionFilter(drawn_directions(lora()), mode="erase", overshoot=1.5))
    assert text.startswith("ProjectionFilter(erase, side='one', overshoot=1.5, Directions(")
