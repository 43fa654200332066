"""Estimators: planted directions, nuisance coordinates, held-out pairs, the dead; by name and in extraction."""

import dataclasses
import math

import pytest
import torch
from support.language_models import PAIRS, ids_only, routed_mixer, scoring_directions
from support.pair_sides import Sides, random_sides
from torch import Tensor

import gradroute as gr
from gradroute.directions.estimators.by_name import as_estimator
from gradroute.directions.estimators.mean_difference import MeanDifference
from gradroute.directions.estimators.ridge import Ridge
from gradroute.directions.estimators.svd import Svd
from gradroute.directions.estimators.t_statistic import TStatistic
from gradroute.directions.validation import auroc

ESTIMATORS = [MeanDifference(), MeanDifference(standardise=True), TStatistic(), Svd(), Ridge(), Ridge(penalty=1.0)]
each_estimator = pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)


def planted_sides(direction: Tensor, noise: float, pairs: int = 64, seed: int = 0) -> Sides:
    """f = prompt +- direction / 2 + noise: each pair's prompt is the same on both sides."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(pairs, len(direction), generator=generator, dtype=torch.float64)

    prompt = normal()
    return {"m": prompt + direction / 2 + noise * normal()}, {"m": prompt - direction / 2 + noise * normal()}


def nuisance_sides(pairs: int, seed: int) -> Sides:
    """A weak signal in coordinates 0..3; loud coordinates without any; and prompts that move a whole correlated block.

    Coordinate 4 holds the signal of 0 with the prompt's noise of 5 in it, so that only their combination is clean.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(d: int) -> Tensor:
        return torch.randn(pairs, d, generator=generator, dtype=torch.float64)

    def side(label: float) -> dict[str, Tensor]:
        f = 0.5 * normal(20)
        f[:, :4] += 0.2 * label
        shared = 4 * normal(1)
        f[:, 4:5] = 0.6 * label + shared + 0.05 * normal(1)
        f[:, 5:6] = shared + 0.05 * normal(1)
        f[:, 10:] *= 20
        return {"m": f}

    return side(1.0), side(-1.0)


def heldout_auroc(estimator: object, seed: int) -> float:
    made = estimator(*nuisance_sides(40, seed))
    hack, clean = (made.score(side) for side in nuisance_sides(400, seed + 1000))
    return auroc(hack, clean)


# Planted directions


@each_estimator
@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_a_planted_direction_is_recovered(estimator: object, noise: float) -> None:
    """8 dimensions, |direction| = 3, prompts of spread 1: cosine > .99 at noise .3 per coordinate and side.

    From 64 pairs; from 512 where a spread or covariance has to be estimated too.
    """
    direction = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    direction *= 3 / direction.norm()
    scaled = isinstance(estimator, Ridge) or getattr(estimator, "standardise", False)
    hack, clean = planted_sides(direction, noise, pairs=512 if scaled else 64)
    single = (hack["m"][0] - clean["m"][0]) @ direction / 3 / (hack["m"][0] - clean["m"][0]).norm()
    made = estimator(hack, clean)
    weights = made.rows["m"].sum(0) if made.scale is None else made.rows["m"].sum(0) / made.scale["m"]
    assert weights @ direction / weights.norm() / 3 > 0.99
    assert noise == 0.1 or single < 0.99


@each_estimator
def test_exchanged_sides_reverse_the_rows(estimator: object) -> None:
    hack, clean = random_sides()
    there, back = estimator(hack, clean), estimator(clean, hack)
    for name in hack:
        torch.testing.assert_close(back.rows[name], -there.rows[name], rtol=1e-9, atol=1e-9)


def test_standardised_and_ridge_beat_the_mean_difference_under_loud_and_correlated_nuisance() -> None:
    kinds = [MeanDifference(), MeanDifference(standardise=True), Ridge()]
    plain, standardised, ridge = (sum(heldout_auroc(kind, seed) for seed in range(5)) / 5 for kind in kinds)
    assert 0.4 < plain < 0.65
    assert standardised > plain + 0.1
    assert ridge > standardised + 0.1
    assert ridge > 0.95


# Held-out pairs


@each_estimator
def test_held_out_pairs_are_not_looked_at_and_drawn_by_seed(estimator: object) -> None:
    hack, clean = random_sides(pairs=8)
    made = dataclasses.replace(estimator, n_heldout=3)(hack, clean)
    assert len(made.heldout) == 3
    kept = [i for i in range(8) if i not in made.heldout]
    alone = estimator(*({name: f[kept] for name, f in side.items()} for side in (hack, clean)))
    for name in hack:
        assert torch.equal(made.rows[name], alone.rows[name])
        assert not torch.allclose(made.rows[name], estimator(hack, clean).rows[name])
    again, other = (dataclasses.replace(estimator, n_heldout=3, seed=seed)(hack, clean) for seed in (0, 1))
    assert made.heldout == again.heldout != other.heldout


# What is refused


@each_estimator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_features_on_both_sides_raise(estimator: object, dtype: torch.dtype) -> None:
    hack, clean = random_sides()
    hack, clean = ({name: f.to(dtype) for name, f in side.items()} for side in (hack, clean))
    hack["m1"] = clean["m1"] * (1 + 1e-8)
    with pytest.raises(gr.errors.DeadDirectionError, match="same features in 1 of 2 modules: `m1`"):
        estimator(hack, clean)


def test_differences_that_cancel_raise() -> None:
    hack = {"m": torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)}
    for estimator in (MeanDifference(), TStatistic(), Ridge(), Ridge(penalty=1.0), Svd()):
        with pytest.raises(gr.errors.DeadDirectionError, match="same features in 1 of 1 modules"):
            estimator(hack, {"m": hack["m"].flip(0)})


def test_an_svd_axis_of_rounding_noise_raises() -> None:
    hack = {"m": torch.outer(torch.arange(1.0, 4.0), torch.ones(3)).double()}
    clean = {"m": torch.zeros(3, 3, dtype=torch.float64)}
    assert len(Svd()(hack, clean).rows["m"]) == 1
    with pytest.raises(gr.errors.DeadDirectionError):
        Svd(k=2)(hack, clean)


def test_a_coordinate_that_does_not_vary_adds_no_noise() -> None:
    hack, clean = random_sides()
    plain = MeanDifference(standardise=True)(hack, clean)
    jitter = 1e-9 * torch.randn(6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hack, clean = ({n: torch.cat([f, 5 + sign * jitter], 1) for n, f in side.items()} for side, sign in
                   ((hack, 1), (clean, -1)))  # fmt: skip
    made = MeanDifference(standardise=True)(hack, clean)
    for name in hack:
        torch.testing.assert_close(made.rows[name][:, :-1], plain.rows[name], rtol=1e-6, atol=1e-6)
        assert made.rows[name][0, -1].abs() < 1e-6


@pytest.mark.parametrize(("estimator", "n_heldout", "found"), [
    (MeanDifference(), 6, "`mean_difference` should have 1 or more pairs .*Found 6 pairs, 6"),
    (TStatistic(), 5, "`t_statistic` should have 2 or more"), (MeanDifference(), -1, "held out"),
])  # fmt: skip
def test_too_few_pairs_raise(estimator: object, n_heldout: int, found: str) -> None:
    with pytest.raises(gr.GradRouteError, match=found):
        dataclasses.replace(estimator, n_heldout=n_heldout)(*random_sides())


@pytest.mark.parametrize("k", [0, -1, True])
def test_a_number_of_rows_that_counts_nothing_raises(k: object) -> None:
    with pytest.raises(gr.GradRouteError, match="`k` should be a positive integer"):
        Svd(k=k)


def test_more_rows_than_coordinates_raise() -> None:
    with pytest.raises(gr.GradRouteError, match="`k` should be at most 3 in `m1`. Found 4"):
        Svd(k=4)(*random_sides())


@pytest.mark.parametrize("penalty", [0.0, -1.0, math.inf, math.nan])
def test_a_penalty_that_is_not_positive_raises(penalty: float) -> None:
    with pytest.raises(gr.GradRouteError, match="`penalty` should be positive"):
        Ridge(penalty=penalty)


# By name


@each_estimator
def test_an_estimator_is_what_its_text_says(estimator: object) -> None:
    assert as_estimator(str(estimator)) == estimator
    assert as_estimator(estimator) is estimator
    changed = dataclasses.replace(estimator, n_heldout=2, seed=3)
    assert str(changed).endswith("n_heldout=2, seed=3)") or "n_heldout=2, seed=3" in str(changed)
    assert as_estimator(str(changed)) == changed != estimator


@pytest.mark.parametrize("text", ["median", "svd(rank=2)", "svd(", "svd(k=x)", "1", "mean_difference(2)", ""])
def test_an_unknown_estimator_raises(text: str) -> None:
    with pytest.raises(gr.GradRouteError, match="`estimator` should be an Estimator or one of mean_difference, t_stat"):
        as_estimator(text)
    directions = scoring_directions([1.0], [0.0])
    directions.provenance = dataclasses.replace(directions.provenance, estimator=text)
    assert directions.known_estimator is None


# In extraction


@each_estimator
def test_extraction_takes_an_estimator_and_records_it(estimator: object) -> None:
    model = routed_mixer()
    plain = gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)
    for extract in (gr.extract_activation_directions, gr.extract_gradient_directions):
        made = extract(model, PAIRS, forward_fn=ids_only, estimator=estimator)
        again = extract(model, PAIRS, forward_fn=ids_only, estimator=str(estimator))
        expected = estimator(made.hack, made.clean)
        assert made.provenance.estimator == str(estimator)
        for name in plain.rows:
            assert torch.equal(made.rows[name], expected.rows[name])
            assert torch.equal(made.rows[name], again.rows[name])
        hack, clean = made.pair_scores()
        assert hack.mean() > clean.mean()
        torch.testing.assert_close(hack, expected.score(made.hack))
    assert plain.provenance.estimator == "mean_difference"


def test_an_unknown_estimator_raises_before_the_model_runs() -> None:
    for extract in (gr.extract_activation_directions, gr.extract_gradient_directions):
        with pytest.raises(gr.GradRouteError, match="`estimator` should be"):
            extract(routed_mixer(), PAIRS, forward_fn=None, estimator="median")
