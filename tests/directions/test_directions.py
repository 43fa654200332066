"""`Directions`: scores, controls, overlap, update in place."""

import dataclasses

import pytest
import torch
from support.language_models import (
    MODULES,
    PAIRS,
    extracted,
    ids_only,
    optimizer_for,
    random_directions,
    routed_mixer,
    train_step,
)
from torch import Tensor

import gradroute as gr

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def with_provenance(directions: gr.Directions, **changes: object) -> gr.Directions:
    made = dataclasses.replace(directions.provenance, **changes)
    return gr.Directions(directions.rows, directions.hack, directions.clean, made)


def features(directions: gr.Directions, rows: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        name: torch.randn(rows, v.shape[1], generator=generator, dtype=torch.float64)
        for name, v in directions.rows.items()
    }


# Scores


@pytest.mark.parametrize("k", [1, 3])
def test_a_score_is_the_sum_of_dot_products_over_modules_and_rows(k: int) -> None:
    directions = random_directions(k)
    f = features(directions)
    expected = [sum(float(v @ f[name][i]) for name in f for v in directions.rows[name]) for i in range(5)]
    torch.testing.assert_close(directions.score(f).tolist(), expected, rtol=1e-12, atol=1e-12)


def test_a_capture_is_scored_row_by_row() -> None:
    model, directions = routed_mixer(), extracted()
    with torch.no_grad(), gr.ablate_quarantine(model), gr.capture_activations(model, pool=torch.ones(2, 3)) as acts:
        model(IDS)
    scores = directions.score(acts)
    assert scores.shape == (2,)
    torch.testing.assert_close(scores, sum(acts[name] @ directions.rows[name][0] for name in MODULES))


def test_pairs_are_scored_apart_by_their_own_direction() -> None:
    hack, clean = extracted().pair_scores()
    assert hack.shape == clean.shape == (4,)
    assert hack.mean() > clean.mean()


def test_low_precision_features_are_scored_in_their_own_type() -> None:
    directions = random_directions()
    f = {name: rows.float() for name, rows in features(directions).items()}
    torch.testing.assert_close(directions.score(f), directions.score(features(directions)).float())


def test_scores_carry_no_gradient() -> None:
    directions = random_directions()
    assert not directions.score({n: f.requires_grad_() for n, f in features(directions).items()}).requires_grad


def test_a_missing_module_raises() -> None:
    directions = random_directions()
    with pytest.raises(gr.GradRouteError, match=r"`features` lacks the module `m1`. Found \['m0'\]"):
        directions.score({"m0": features(directions)["m0"]})


def test_features_of_another_width_raise() -> None:
    directions = random_directions()
    with pytest.raises(gr.GradRouteError, match="`features` of `m1` should be 6 wide. Found 5"):
        directions.score({**features(directions), "m1": torch.zeros(5, 5)})


def test_modules_with_different_numbers_of_rows_raise() -> None:
    directions = random_directions()
    with pytest.raises(gr.GradRouteError, match="`features` should have 5 rows in `m1` too. Found 1"):
        directions.score({**features(directions), "m1": torch.zeros(1, 6)})


@pytest.mark.parametrize("settings", [{"reduction": "sum"}, {"features": "output"}])
def test_a_capture_with_other_settings_raises(settings: dict[str, str]) -> None:
    model = routed_mixer()
    with torch.no_grad(), gr.capture_activations(model, pool=torch.ones(2, 3), **settings) as acts:
        model(IDS)
    with pytest.raises(gr.GradRouteError, match=r"`features` should be captured as \('activation', 'bott"):
        extracted().score(acts)


def test_captured_gradients_are_not_scored_by_activation_directions() -> None:
    model = routed_mixer()
    with gr.capture_gradients(model) as grads:
        model(IDS).sum().backward()
    with pytest.raises(gr.GradRouteError, match="Found .'gradient', 'bottleneck', 'sum'"):
        extracted().score(grads)


def test_standardised_features_are_centred_and_scaled_first() -> None:
    directions = random_directions(k=2)
    f = features(directions)
    centre = {name: torch.arange(v.shape[1]).double() for name, v in directions.rows.items()}
    scale = {name: 1.0 + torch.arange(v.shape[1]).double() for name, v in directions.rows.items()}
    made = dataclasses.replace(directions, centre=centre, scale=scale)
    expected = [
        sum(float(v @ ((f[n][i] - centre[n]) / scale[n])) for n in f for v in directions.rows[n]) for i in range(5)
    ]
    torch.testing.assert_close(made.score(f).tolist(), expected, rtol=1e-12, atol=1e-12)
    offset = made.score({n: torch.zeros(1, v.shape[1]).double() for n, v in directions.rows.items()})
    products = sum(f[n] @ w for n, w in made.weights().items())
    torch.testing.assert_close(products + offset, made.score(f))


def test_modules_without_rows_do_not_count() -> None:
    directions = random_directions()
    fewer = dataclasses.replace(directions, rows={"m1": directions.rows["m1"]})
    torch.testing.assert_close(fewer.score(features(directions)), features(directions)["m1"] @ directions.rows["m1"][0])
    assert directions.overlap(fewer) == pytest.approx(0.5)
    assert fewer.overlap(directions) == pytest.approx(0.5)
    assert list(directions.principal_angles(fewer)) == ["m1"]


def test_overlap_counts_dropped_rows_as_nothing() -> None:
    directions = random_directions(k=3)
    fewer = dataclasses.replace(directions, rows={n: v[:2] for n, v in directions.rows.items()})
    assert directions.overlap(fewer) == pytest.approx(2 / 3)


# Construction


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"rows": {}}, "`rows` should name at least one module"),
        ({"hack": {"m1": torch.zeros(3, 4), "m0": torch.zeros(3, 4)}}, "same modules in the same order"),
        ({"hack": {"m0": torch.zeros(3, 4), "m1": torch.zeros(2, 4)}}, r"one row per pair. Found \[2, 3\]"),
        ({"rows": {"m0": torch.ones(1, 4), "m1": torch.ones(1, 5)}}, r"`m1` should be as wide. Found \[4, 5\]"),
        ({"clean": {"m0": torch.zeros(3, 4), "m1": torch.full((3, 4), float("nan"))}}, "`m1` should be finite"),
        ({"scale": {"m0": torch.ones(4), "m1": torch.ones(5)}}, r"`m1` should be as wide. Found \[4, 5\]"),
        ({"scale": {"m0": torch.ones(4), "m1": torch.zeros(4)}}, "`scale` of `m1` should be positive"),
        ({"centre": {"m0": torch.full((4,), float("inf")), "m1": torch.ones(4)}}, "`m0` should be finite"),
    ],
)
def test_parts_that_do_not_fit_raise(change: dict[str, dict[str, Tensor]], found: str) -> None:
    made = random_directions(widths=(4, 4))
    parts = {"rows": made.rows, "hack": made.hack, "clean": made.clean, **change}
    with pytest.raises(gr.GradRouteError, match=found):
        gr.Directions(**parts, provenance=made.provenance)


def test_a_row_of_zeros_raises() -> None:
    made = random_directions()
    with pytest.raises(gr.GradRouteError, match="`m1`"):
        gr.Directions({**made.rows, "m1": 0 * made.rows["m1"]}, made.hack, made.clean, made.provenance)


# Controls


@pytest.mark.parametrize("k", [1, 3])
def test_random_rows_are_orthonormal_and_the_pair_features_the_same(k: int) -> None:
    real = random_directions(k)
    control = real.random_like(seed=1)
    for name in real.rows:
        torch.testing.assert_close(control.rows[name] @ control.rows[name].T, torch.eye(k, dtype=torch.float64))
        assert control.rows[name].shape == real.rows[name].shape
        assert not torch.allclose(control.rows[name], real.rows[name])
        assert torch.equal(control.hack[name], real.hack[name])
        assert torch.equal(control.clean[name], real.clean[name])
    assert (control.provenance.estimator, control.provenance.seed) == ("random", 1)


def test_a_seed_determines_the_rows_whatever_the_global_generator() -> None:
    real = random_directions()
    torch.manual_seed(0)
    first, state = real.random_like(seed=1), torch.get_rng_state()
    torch.manual_seed(1)
    again, other = real.random_like(seed=1), real.random_like(seed=2)
    assert all(torch.equal(first.rows[name], again.rows[name]) for name in real.rows)
    assert not any(torch.allclose(first.rows[name], other.rows[name]) for name in real.rows)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_rows_have_no_preferred_direction() -> None:
    real = random_directions(k=2, widths=(4,))
    draws = torch.stack([real.random_like(seed=seed).rows["m0"] for seed in range(400)])
    # Haar: mean 0, second moment 1/d. The standard errors over 400 draws are 0.025 and about 0.015.
    torch.testing.assert_close(draws.mean(0), torch.zeros(2, 4, dtype=torch.float64), rtol=0, atol=0.1)
    torch.testing.assert_close(draws.pow(2).mean(0), torch.full((2, 4), 0.25, dtype=torch.float64), rtol=0, atol=0.06)
    overlaps = [real.overlap(real.random_like(seed=seed)) for seed in range(100)]
    assert abs(sum(overlaps) / 100) < 0.1
    assert max(map(abs, overlaps)) > 0.3


# Overlap


@pytest.mark.parametrize("k", [1, 3])
def test_overlap_is_one_with_itself_and_minus_one_with_the_reverse(k: int) -> None:
    made = random_directions(k)
    reverse = gr.Directions({n: -v for n, v in made.rows.items()}, made.hack, made.clean, made.provenance)
    assert made.overlap(made) == pytest.approx(1.0, abs=1e-12)
    assert made.overlap(reverse) == pytest.approx(-1.0, abs=1e-12)


def test_overlap_is_the_mean_cosine() -> None:
    a, b = random_directions(2, seed=0), random_directions(2, seed=1)
    cosines = [float(a.rows[n][i] @ b.rows[n][i]) for n in a.rows for i in range(2)]
    assert a.overlap(b) == pytest.approx(sum(cosines) / 4, abs=1e-12)
    assert abs(a.overlap(b)) > 0.01


def test_overlap_needs_the_same_modules_and_shapes() -> None:
    with pytest.raises(gr.GradRouteError, match=r"same modules and shapes. Different: \['m1'\]"):
        random_directions().overlap(random_directions(widths=(4, 5)))


# Update in place


def test_update_takes_over_rows_and_pair_features_and_counts_versions() -> None:
    mine, fresh = random_directions(seed=0), random_directions(seed=1)
    assert mine.version == mine.step == 0
    returned = mine.update_(fresh, step=7)
    assert returned is mine
    assert (mine.version, mine.step) == (1, 7)
    for name in fresh.rows:
        for mine_now, theirs in ((mine.rows, fresh.rows), (mine.hack, fresh.hack), (mine.clean, fresh.clean)):
            assert torch.equal(mine_now[name], theirs[name])
    mine.update_(random_directions(seed=2), step=9)
    assert (mine.version, mine.step) == (2, 9)


def test_update_records_the_view_of_the_fresh_ones() -> None:
    mine = with_provenance(random_directions(), view="on")
    mine.update_(random_directions(seed=1), step=1)
    assert mine.provenance.view == "ablated"


def test_a_random_control_keeps_its_rows_and_takes_the_pair_features() -> None:
    control, fresh = random_directions(seed=0).random_like(seed=3), random_directions(seed=1)
    rows = dict(control.rows)
    control.update_(fresh, step=5)
    assert all(control.rows[name] is rows[name] for name in rows)
    assert all(torch.equal(control.hack[name], fresh.hack[name]) for name in rows)
    assert (control.version, control.provenance.estimator, control.provenance.seed) == (1, "random", 3)


def test_real_directions_take_no_rows_from_a_random_control() -> None:
    real = random_directions(seed=0)
    with pytest.raises(gr.errors.RefreshError, match="`fresh`.*estimator.*'mean_difference'.*'random'"):
        real.update_(random_directions(seed=1).random_like(seed=3), step=1)
    assert real.version == 0


def test_update_from_itself_raises() -> None:
    made = random_directions()
    with pytest.raises(gr.errors.RefreshError, match="`fresh` should be another extraction. Found the very object"):
        made.update_(made, step=1)


@pytest.mark.parametrize("name", ["source", "feature", "reduction", "pair_hash", "model"])
def test_update_refuses_other_provenance_and_changes_nothing(name: str) -> None:
    mine = random_directions()
    other = with_provenance(random_directions(seed=1), **{name: "other"})
    with pytest.raises(gr.errors.RefreshError, match=f"`fresh` should have the {name} of .*Found 'other'"):
        mine.update_(other, step=1)
    assert mine.version == 0
    assert torch.equal(mine.rows["m0"], random_directions().rows["m0"])


def test_update_refuses_other_pairs() -> None:
    model = routed_mixer()
    mine = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)
    reordered = gr.extract_activation_directions(model, PAIRS[::-1], forward_fn=ids_only)
    with pytest.raises(gr.errors.RefreshError, match="pair_hash"):
        mine.update_(reordered, step=1)


def test_update_refuses_other_modules() -> None:
    with pytest.raises(gr.errors.RefreshError, match=r"same modules and shapes. Different: \['m1', 'm2'\]"):
        random_directions().update_(random_directions(widths=(4, 5, 6)), step=1)


# Identity of the model


def test_identity_is_of_the_frozen_base_and_survives_training_and_attaching() -> None:
    model, before = routed_mixer(), extracted().provenance.model
    train_step(model, optimizer_for(model))
    assert gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only).provenance.model == before
    gr.detach(model)
    gr.attach(model, r=3, target_modules=["out"])
    assert gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only).provenance.model == before
    assert extracted(seed=1).provenance.model != before
