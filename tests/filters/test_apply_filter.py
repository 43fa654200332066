"""`apply_filter`: which directions and gradients it takes, which it refuses, and that it runs once."""

import math

import pytest
import torch
from support.filtered_towers import backward, gains, layers_of, lora
from support.gradient_directions import BOTTLENECK, deployed_rows, directions_of, drawn_directions
from support.models import gradients
from support.tiny_models import peft_model, token_ids

import gradroute as gr
from gradroute.errors import GradRouteError
from gradroute.filters import apply_filter
from gradroute.filters.projection import ProjectionFilter

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
        {n: torch.stack([3 * v[0], (v[0] + v[1]) / math.sqrt(2)]) for n, v in straight.rows.items()}, model
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
        apply_filter(
            model, ProjectionFilter(directions_of({n: sign * v for n, v in along.items()}, model), mode="erase")
        )
        norms = [float(g.norm()) for g in deployed_rows(model).values()]
        assert max(norms) < 1e-12 if sign > 0 else min(norms) > 0.1


@pytest.mark.parametrize("rows", [[0, 0], [0, 1, 2, 3]])
def test_dependent_rows_are_refused(rows: list[int]) -> None:
    model = gains()
    directions = directions_of(
        {n: torch.eye(3, dtype=torch.float64)[[i % 3 for i in rows]] for n, _ in layers_of(model)}, model
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
        apply_filter(model, ProjectionFilter(directions_of({"lower": rows["lower"]}, model), mode="erase"))
    with pytest.raises(GradRouteError, match=r"not in the model: \['third'\]"):
        apply_filter(model, ProjectionFilter(directions_of({**rows, "third": rows["lower"]}, model), mode="erase"))
    narrow = directions_of({name: v[:, 1:] for name, v in rows.items()}, model)
    with pytest.raises(GradRouteError, match="22 wide. Found 21"):
        apply_filter(model, ProjectionFilter(narrow, mode="erase"))


# Gradients


@pytest.mark.corner("a block has no gradient when the filter runs", "`GradRouteError`; no gradient is touched")
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
    stats = apply_filter(model, ProjectionFilter(drawn_directions(model), mode="erase"))
    assert not any(g.any() for g in deployed_rows(model).values())
    assert (stats.cin, stats.cout, stats.residual) == (0.0, 0.0, 0.0)
    assert stats.null == pytest.approx(math.sqrt((1 / 44 + 1 / 40) / 2))


@pytest.mark.corner("a measuring filter is applied twice", "the same figures")
def test_measuring_again_changes_nothing_and_tells_the_same() -> None:
    model = lora()
    f = ProjectionFilter(drawn_directions(model), mode="measure")
    first = apply_filter(model, f)
    assert apply_filter(model, f) == first
    erased = apply_filter(model, ProjectionFilter(drawn_directions(model), mode="erase"))
    assert erased.cin == first.cin
    # What the other filter has left.
    assert apply_filter(model, f).cin == pytest.approx(erased.cout)


@pytest.mark.corner("a filter is applied to the same gradient twice", "`GradRouteError`")
def test_a_filter_changes_a_gradient_once() -> None:
    model = lora()
    f = ProjectionFilter(drawn_directions(model), mode="erase")
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


@pytest.mark.corner(
    "a filter with directions of another base model whose modules have the same names", "`GradRouteError`"
)
def test_directions_of_another_base_model_raise_and_leave_gradients_alone() -> None:
    model, other = lora(), lora()
    with torch.no_grad():
        other.lower.base_layer.weight.mul_(1.5)
    before, along = deployed_rows(model), {name: (g / g.norm())[None] for name, g in deployed_rows(model).items()}
    with pytest.raises(GradRouteError, match="of another one, whose modules have the same names"):
        apply_filter(model, ProjectionFilter(directions_of(along, other), mode="erase"))
    assert all(torch.equal(g, before[name]) for name, g in deployed_rows(model).items())
    assert apply_filter(model, ProjectionFilter(directions_of(along, model), mode="erase")).fired == 1
