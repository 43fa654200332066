"""`ProjectionFilter` and `apply_filter`: the formulas, the sign, conservation, and every way to have no effect."""

import copy
import math

import pytest
import torch
from gradient_directions import (
    ACTIVATION,
    BOTTLENECK,
    deployed_row,
    deployed_rows,
    directions_of,
    drawn_directions,
    quarantine_gradients,
)
from language_models import random_directions
from models import Tower, gradients, randomize_blocks, routed_tower
from tiny_models import peft_model, token_ids
from torch import Tensor, nn

import gradroute as gr
from gradroute.errors import GradRouteError, GradRouteWarning
from gradroute.protocol import routed_layers
from gradroute.routing.apply_filter import apply_filter
from gradroute.routing.filters import ProjectionFilter

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
UPSTREAM = torch.randn(7, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def backward(model: nn.Module, seed: int = 1) -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dtype = next(model.parameters()).dtype
    (model(x.to(dtype)) * UPSTREAM.to(dtype)).sum().backward()


def lora(dtype: torch.dtype = torch.float64) -> Tower:
    model = routed_tower(dtype)
    backward(model)
    return model


def gains(dtype: torch.dtype = torch.float64, **settings: object) -> Tower:
    torch.manual_seed(0)
    model = Tower().to(dtype)
    gr.attach(model, **{"r": 3, "lora_alpha": 4.0, "parametrization": "svd_gain", **settings})
    randomize_blocks(model)
    backward(model)
    return model


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
    against = directions_of({name: -(g / g.norm())[None] for name, g in before.items()})
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


@both_kinds
def test_magnitude_is_preserved_and_conservation_reported_as_broken(kind: str) -> None:
    model = MODELS[kind]()
    directions = drawn_directions(model, 2)
    before = deployed_rows(model)
    stats = apply_filter(model, ProjectionFilter(directions, mode="erase", side="two", preserve_magnitude=True))
    for name, g in deployed_rows(model).items():
        assert float(g.norm()) == pytest.approx(float(before[name].norm()), rel=1e-12)
        V = directions.rows[name]
        kept = before[name] - V.T @ (V @ before[name])
        assert float(torch.dot(g, kept) / g.norm() / kept.norm()) == pytest.approx(1.0, abs=1e-12)
        assert float(g.norm()) > 1.0001 * float(kept.norm())
    assert stats.residual > 1e-3


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


def layers_of(model: nn.Module) -> list[tuple[str, gr.SvdGain]]:
    return list(routed_layers(model).items())


# The sign: which update makes hacks likelier


SOLVE, HACK, OTHER = 0, 1, 2


class Choice(nn.Module):
    """A policy over {solve, hack, other}; solving and hacking are rewarded alike, hacking is learned faster."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(x)).log_softmax(-1)


def nll_directions(model: nn.Module, x: Tensor) -> gr.Directions:
    """unit(grad NLL(hack) - grad NLL(solve)), in the coordinates of the deployed parameters."""
    rows = {}
    for action, sign in ((HACK, 1.0), (SOLVE, -1.0)):
        model.zero_grad()
        (-model(x)[:, action].mean()).backward()
        for name, row in deployed_rows(model).items():
            rows[name] = rows.get(name, 0) + sign * row
    model.zero_grad()
    return directions_of({name: (row / row.norm())[None] for name, row in rows.items()})


def gap(model: nn.Module, x: Tensor) -> float:
    """Mean log-odds of the hack against solving: what hack minus clean directions are about."""
    with torch.no_grad(), gr.ablate_quarantine(model):
        return float((model(x)[:, HACK] - model(x)[:, SOLVE]).mean())


def reinforce(kind: str, sign: float | None, steps: int = 60) -> tuple[float, float]:
    """Train a policy with exact policy gradients; its log-odds of hack and its probability of `other` afterwards."""
    torch.manual_seed(3)
    model = Choice().double()
    gr.attach(model, r=4, lora_alpha=8.0, target_modules=["linear"], parametrization=kind)
    randomize_blocks(model, std=0.1)
    model.head.weight.data.mul_(2.0)
    x = torch.randn(16, 6, dtype=torch.float64) + 1.0
    advantages = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    for _ in range(steps):
        directions = nll_directions(model, x)
        if sign is not None:
            directions = directions_of({name: sign * rows for name, rows in directions.rows.items()})
        pi = model(x).exp().detach()
        # sum over actions of pi(a) A(a) NLL(a): REINFORCE in expectation
        advantage = advantages - (pi * advantages).sum(1, keepdim=True)
        (-(pi * advantage * model(x)).sum(1).mean()).backward()
        if sign is not None:
            apply_filter(model, ProjectionFilter(directions, mode="erase"))
        with torch.no_grad():
            for _, p in gr.deployed_parameters(model):
                p.sub_(0.1 * p.grad)
        model.zero_grad()
    with torch.no_grad():
        return gap(model, x), float(model(x).exp().mean(0)[OTHER])


@pytest.mark.parametrize("kind", ["lora", "svd_gain"])
def test_erasing_stops_a_policy_from_moving_toward_the_planted_hack(kind: str) -> None:
    (start, other), (unfiltered, _) = reinforce(kind, None, steps=0), reinforce(kind, None)
    erased, learned = reinforce(kind, 1.0)
    reversed_sign, _ = reinforce(kind, -1.0)
    assert unfiltered > start + 0.2
    assert erased - start < 0.01 * (unfiltered - start)
    # It still learns what both optima share, to leave `other`; and the opposite sign stops nothing.
    assert learned < other - 0.01
    assert reversed_sign > unfiltered - 1e-9


def test_a_step_against_c_makes_the_hack_likelier_than_the_clean_completion() -> None:
    torch.manual_seed(0)
    model = Choice().double()
    gr.attach(model, r=3, lora_alpha=4.0, target_modules=["linear"])
    randomize_blocks(model)
    x = torch.randn(4, 6, dtype=torch.float64)
    rows = nll_directions(model, x).rows
    for row, advantage in ((HACK, 1.0), (SOLVE, -1.0), (SOLVE, 1.0), (HACK, -1.0)):
        trial = copy.deepcopy(model)
        before = gap(model, x)
        (-advantage * trial(x)[:, row].mean()).backward()
        c = float(rows["linear"] @ deployed_rows(trial)["linear"])
        with torch.no_grad():
            for _, p in gr.deployed_parameters(trial):
                p.sub_(1e-4 * p.grad)
        assert (c > 0) == (gap(trial, x) > before) == (advantage == (1.0 if row == HACK else -1.0))


def test_bottleneck_gradients_of_gains_are_the_gradients_that_are_filtered() -> None:
    model = gains()
    model.zero_grad()
    with gr.capture_gradients(model) as captured:
        backward(model)
    for name, layer in layers_of(model):
        torch.testing.assert_close(captured[name].sum(0), layer.gain.grad, rtol=0, atol=1e-12)
    directions = drawn_directions(model, made=BOTTLENECK)
    assert apply_filter(model, ProjectionFilter(directions, mode="erase", side="two")).cout < 1e-12


def test_directions_without_a_sign_warn_where_the_sign_matters() -> None:
    model = gains()
    activations = drawn_directions(model, made=ACTIVATION)
    for side in ("one", "reverse"):
        with pytest.warns(GradRouteWarning, match="have no sign in gradient space"):
            ProjectionFilter(activations, mode="erase", side=side)
    ProjectionFilter(activations.random_like(0), mode="erase")
    two_sided = ProjectionFilter(activations, mode="erase", side="two")
    before = deployed_rows(model)
    apply_filter(model, two_sided)
    for name, g in deployed_rows(model).items():
        V = activations.rows[name]
        torch.testing.assert_close(g, before[name] - V.T @ (V @ before[name]), rtol=0, atol=1e-13)


# Directions


def test_a_refresh_is_seen_by_the_next_application() -> None:
    model = lora()
    directions, fresh = drawn_directions(model, seed=0), drawn_directions(model, seed=5)
    f = ProjectionFilter(directions, mode="erase", side="two")
    apply_filter(model, f)
    directions.update_(fresh, step=1)
    model.zero_grad()
    backward(model)
    before = deployed_rows(model)
    apply_filter(model, f)
    for name, g in deployed_rows(model).items():
        V = fresh.rows[name]
        torch.testing.assert_close(g, before[name] - V.T @ (V @ before[name]), rtol=0, atol=1e-12)


def test_rows_of_standardised_features_are_divided_by_their_scale() -> None:
    model = lora()
    plain = drawn_directions(model)
    scale = {name: torch.linspace(0.5, 3, v.shape[1], dtype=torch.float64) for name, v in plain.rows.items()}
    centre = {name: torch.ones_like(s) for name, s in scale.items()}
    directions = gr.Directions(plain.rows, plain.hack, plain.clean, plain.provenance, centre=centre, scale=scale)
    before = deployed_rows(model)
    apply_filter(model, ProjectionFilter(directions, mode="erase", side="two"))
    for name, g in deployed_rows(model).items():
        w = directions.weights()[name]
        torch.testing.assert_close(g, before[name] - w * (w @ before[name]) / (w @ w), rtol=0, atol=1e-12)


def test_a_module_whose_rows_were_dropped_as_noise_keeps_its_gradient() -> None:
    model = lora()
    full = drawn_directions(model)
    directions = gr.Directions({"lower": full.rows["lower"]}, full.hack, full.clean, full.provenance)
    before = deployed_rows(model)
    stats = apply_filter(model, ProjectionFilter(directions, mode="erase", side="two"))
    after = deployed_rows(model)
    assert torch.equal(after["upper"], before["upper"])
    assert not torch.equal(after["lower"], before["lower"])
    upper = stats.modules["upper"]
    assert (upper.cin, upper.null, upper.fired) == (0.0, 0.0, 0.0)
    assert 0 < stats.cin < stats.modules["lower"].cin


def test_oblique_rows_are_orthonormalised_where_signs_do_not_matter_and_refused_where_they_do() -> None:
    model = lora()
    straight = drawn_directions(model, 2)
    oblique = directions_of(
        {n: torch.stack([3 * v[0], (v[0] + v[1]) / math.sqrt(2)]) for n, v in straight.rows.items()}
    )
    with pytest.raises(GradRouteError, match=r"orthogonal rows.*cosine of 0\.707"):
        apply_filter(model, ProjectionFilter(oblique, mode="erase"))
    before = deployed_rows(model)
    apply_filter(model, ProjectionFilter(oblique, mode="erase", side="two"))
    for name, g in deployed_rows(model).items():
        V = straight.rows[name]
        torch.testing.assert_close(g, before[name] - V.T @ (V @ before[name]), rtol=0, atol=1e-12)


def test_orthonormalising_keeps_the_signs_of_rows() -> None:
    model = lora()
    before = deployed_rows(model)
    along = {name: (g / g.norm())[None] for name, g in before.items()}
    for sign in (1.0, -2.0):
        model.zero_grad()
        backward(model)
        apply_filter(model, ProjectionFilter(directions_of({n: sign * v for n, v in along.items()}), mode="erase"))
        norms = [float(g.norm()) for g in deployed_rows(model).values()]
        assert max(norms) < 1e-12 if sign > 0 else min(norms) > 0.1


@pytest.mark.parametrize("rows", [[0, 0], [0, 1, 2, 3]])
def test_dependent_rows_are_refused(rows: list[int]) -> None:
    model = gains()
    directions = directions_of(
        {n: torch.eye(3, dtype=torch.float64)[[i % 3 for i in rows]] for n, _ in layers_of(model)}
    )
    with pytest.raises(GradRouteError, match="independent rows"):
        apply_filter(model, ProjectionFilter(directions, mode="erase", side="two"))


def test_bottleneck_directions_on_lora_matrices_raise_with_the_fix() -> None:
    model = lora()
    with pytest.raises(GradRouteError, match=r'features="parameter", or attach\(..., parametrization="svd_gain"\)'):
        apply_filter(model, ProjectionFilter(drawn_directions(model, made=BOTTLENECK), mode="measure"))


def test_modules_without_a_direction_and_directions_without_a_module_raise() -> None:
    model = lora()
    rows = drawn_directions(model).rows
    with pytest.raises(GradRouteError, match=r"Without a direction: \['upper'\]"):
        apply_filter(model, ProjectionFilter(directions_of({"lower": rows["lower"]}), mode="erase"))
    with pytest.raises(GradRouteError, match=r"not in the model: \['third'\]"):
        apply_filter(model, ProjectionFilter(directions_of({**rows, "third": rows["lower"]}), mode="erase"))
    narrow = directions_of({name: v[:, 1:] for name, v in rows.items()})
    with pytest.raises(GradRouteError, match="22 wide, as its deployed gradient. Found 21"):
        apply_filter(model, ProjectionFilter(narrow, mode="erase"))


# Gradients


def test_a_gradient_of_none_raises_and_leaves_the_others_alone() -> None:
    model = lora()
    f = ProjectionFilter(drawn_directions(model), mode="erase", side="two")
    model.upper.lora_B.grad = None
    before = gradients(model)
    with pytest.raises(GradRouteError, match="`upper` is None"):
        apply_filter(model, f)
    assert all(torch.equal(g, before[name]) for name, g in gradients(model).items())
    routed = gains()
    routed.upper.gain_quarantine.grad = None
    with pytest.raises(GradRouteError, match="is None"):
        apply_filter(routed, ProjectionFilter(drawn_directions(routed), mode="route"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_raises_and_is_left_alone(value: float) -> None:
    model = lora()
    model.upper.lora_A.grad[0, 0] = value
    before = gradients(model)
    with pytest.raises(GradRouteError, match="`upper` is not finite"):
        apply_filter(model, ProjectionFilter(drawn_directions(model), mode="erase"))
    assert all(torch.equal(g, before[name]) for name, g in gradients(model).items() if name != "upper.lora_A")


def test_zero_gradients_stay_zero() -> None:
    model = lora()
    for _, p in gr.deployed_parameters(model):
        p.grad.zero_()
    stats = apply_filter(model, ProjectionFilter(drawn_directions(model), mode="erase", preserve_magnitude=True))
    assert not any(g.any() for g in deployed_rows(model).values())
    assert (stats.cin, stats.cout, stats.residual) == (0.0, 0.0, 0.0)
    assert stats.null == pytest.approx(math.sqrt((1 / 44 + 1 / 40) / 2))


def test_rescaling_what_is_only_rounding_raises() -> None:
    model = lora()
    along = directions_of({name: (g / g.norm())[None] for name, g in deployed_rows(model).items()})
    with pytest.raises(GradRouteError, match="nothing is kept which could be rescaled"):
        apply_filter(model, ProjectionFilter(along, mode="erase", preserve_magnitude=True))


@pytest.mark.parametrize("mode", ["erase", "measure"])
def test_a_filter_runs_once_on_a_gradient(mode: str) -> None:
    model = lora()
    f = ProjectionFilter(drawn_directions(model), mode=mode)
    apply_filter(model, f)
    with pytest.raises(GradRouteError, match="filtered by this filter already"):
        apply_filter(model, f)
    # Another filter may follow, and does not make the first one forget.
    apply_filter(model, ProjectionFilter(drawn_directions(model, seed=9), mode="erase", side="two"))
    with pytest.raises(GradRouteError, match="filtered by this filter already"):
        apply_filter(model, f)
    # A gradient to which a backward has added is another one, and so is a new one.
    backward(model)
    apply_filter(model, f)
    model.zero_grad()
    backward(model)
    apply_filter(model, f)
    model.zero_grad(set_to_none=False)
    backward(model)
    apply_filter(model, f)


def test_what_failed_can_be_done_again() -> None:
    model = lora()
    f = ProjectionFilter(drawn_directions(model), mode="erase", side="two")
    kept = model.upper.lora_B.grad
    model.upper.lora_B.grad = None
    with pytest.raises(GradRouteError):
        apply_filter(model, f)
    model.upper.lora_B.grad = kept
    assert apply_filter(model, f).cout < 1e-12


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_peft_models_are_filtered(architecture: str) -> None:
    model = peft_model(architecture, torch.float64)
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    directions = drawn_directions(model, 2)
    before = deployed_rows(model)
    stats = apply_filter(model, ProjectionFilter(directions, mode="erase", side="two"))
    for name, g in deployed_rows(model).items():
        V = directions.rows[name]
        torch.testing.assert_close(g, before[name] - V.T @ (V @ before[name]), rtol=0, atol=1e-12)
        assert not torch.equal(g, before[name])
    assert stats.cin > 1e-3 > 1e-10 > stats.cout


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "remove"}, "`mode` should be one of"),
        ({"mode": "erase", "side": "both"}, "`side` should be one of"),
        ({"mode": "erase", "overshoot": 0}, "`overshoot` should be a positive"),
        ({"mode": "erase", "overshoot": math.inf}, "`overshoot` should be a positive"),
        ({"mode": "measure", "overshoot": 2.0}, "`overshoot` has no effect"),
        ({"mode": "route", "preserve_magnitude": True}, r"removed \+ kept = gradient"),
        ({"mode": "measure", "preserve_magnitude": True}, 'needs mode="erase"'),
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
    text = repr(ProjectionFilter(drawn_directions(lora()), mode="erase", overshoot=1.5, preserve_magnitude=True))
    assert text.startswith("ProjectionFilter(erase, side='one', overshoot=1.5, preserve_magnitude, Directions(")
