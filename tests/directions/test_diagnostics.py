"""Diagnostics against slow references and known nulls, the table, the picture, and validation on labelled rollouts."""

import dataclasses
import math

import pytest
import torch
from support.language_models import (
    MADE_OF_NUMBERS,
    PAIRS,
    ids_only,
    random_directions,
    routed_mixer,
)
from torch import Tensor

import gradroute as gr
from gradroute.directions import placebo_pairs, reversed_sign, summary, validate
from gradroute.directions._draws import haar_rows
from gradroute.directions.diagnostics import effect_size, share, split_half_cosines
from gradroute.directions.directions import principal_angles
from gradroute.directions.estimators.mean_difference import MeanDifference
from gradroute.directions.estimators.ridge import Ridge
from gradroute.directions.estimators.svd import Svd
from gradroute.directions.estimators.t_statistic import TStatistic
from gradroute.directions.validation import auroc, auroc_interval


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(estimator: object, signal: float = 3.0, pairs: int = 12, widths: tuple[int, ...] = (5, 8)) -> gr.Directions:
    """Module m0 has a planted difference along its first coordinate; the others have none."""
    hack = {f"m{i}": normal(pairs, d, seed=i) for i, d in enumerate(widths)}
    clean = {f"m{i}": normal(pairs, d, seed=10 + i) for i, d in enumerate(widths)}
    hack["m0"][:, 0] += signal
    found = estimator(hack, clean)
    return gr.Directions(
        found.rows, hack, clean, dataclasses.replace(MADE_OF_NUMBERS, estimator=str(estimator)),
        centre=found.centre, scale=found.scale, heldout=found.heldout, estimator=estimator,
    )  # fmt: skip


# Figures


def test_auroc_counts_pairs_in_the_right_order_and_ties_half() -> None:
    hack, clean = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0])
    wins = sum((h > c) + 0.5 * (h == c) for h in hack.tolist() for c in clean.tolist())
    assert auroc(hack, clean) == pytest.approx(wins / 6)
    assert auroc(clean, hack) == pytest.approx(1 - wins / 6)
    assert auroc(hack + 9, clean) == 1


@pytest.mark.parametrize(("n", "m", "value"), [(10, 40, 0.9), (5, 5, 1.0), (25, 25, 0.5), (8, 30, 0.0)])
def test_the_ends_of_the_interval_solve_its_equation(n: int, m: int, value: float) -> None:
    low, high = auroc_interval(value, n, m)
    for t in {low, high} - {0.0, 1.0}:
        average = (n + m) / 2
        variance = t * (1 - t) / (n * m) * (1 + (average - 1) * ((1 - t) / (2 - t) + t / (1 + t)))
        assert abs(t - value) == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-5)
    assert 0 <= low <= value <= high <= 1
    assert high - low > 0.05
    wide = auroc_interval(value, n, m, level=0.99)
    assert wide[1] - wide[0] > high - low


def test_the_interval_covers_the_true_value_about_as_often_as_it_says() -> None:
    """Normal scores one deviation apart: AUROC .76. 95 % +- 3 standard errors of 400 draws."""
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        hack, clean = torch.randn(12, generator=generator) + 1, torch.randn(30, generator=generator)
        low, high = auroc_interval(auroc(hack, clean), 12, 30)
        inside += low <= 0.7602 <= high
    assert 0.915 <= inside / 400 <= 0.985


def test_effect_size_is_cohens_d() -> None:
    hack, clean = torch.tensor([2.0, 4.0, 6.0]), torch.tensor([1.0, 2.0, 3.0])
    assert effect_size(hack, clean) == pytest.approx((4 - 2) / math.sqrt((4 + 1) / 2))
    assert math.isnan(effect_size(hack[:1], clean[:1]))


def test_principal_angles_of_known_planes() -> None:
    V = torch.eye(4)[:2].double()
    angle = 0.3
    W = torch.tensor([[1.0, 0, 0, 0], [0, math.cos(angle), math.sin(angle), 0]]).double()
    assert principal_angles(V, W).tolist() == pytest.approx([0, angle], abs=1e-7)
    assert principal_angles(V, W.flip(0) * torch.tensor([[-2.0], [3.0]])).tolist() == pytest.approx(
        [0, angle], abs=1e-7
    )
    assert principal_angles(V, torch.eye(4)[2:3].double()).tolist() == pytest.approx([math.pi / 2])


@pytest.mark.parametrize("k", [1, 3])
def test_random_rows_have_the_share_of_the_analytic_null(k: int) -> None:
    D, d = normal(40, 12), 12
    generator = torch.Generator().manual_seed(1)
    shares = torch.tensor([share(haar_rows(k, d, generator), D) for _ in range(1500)])
    assert shares.square().mean().sqrt().item() == pytest.approx(math.sqrt(k / (2 * d)), rel=0.05)
    V = haar_rows(k, d, generator)
    slow = [sum(max(0.0, float(v @ x)) ** 2 for v in V) / float(x @ x) for x in D]
    assert share(V, D) == pytest.approx(math.sqrt(sum(slow) / len(slow)))
    assert share(V, torch.cat([D, torch.zeros(1, d).double()])) == pytest.approx(share(V, D))


def test_halves_of_pairs_agree_where_there_is_a_signal_and_not_elsewhere() -> None:
    directions = made(MeanDifference(), signal=6.0, pairs=40)
    found = summary(directions).modules
    assert found["m0"].split_half > 0.95
    assert abs(found["m1"].split_half) < 0.7
    assert found["m0"].share > found["m0"].random > found["m0"].null > 0
    generator = torch.Generator().manual_seed(5)
    slow, kept = [], list(range(40))
    for _ in range(10):
        order = torch.randperm(40, generator=generator).tolist()
        halves = [[kept[i] for i in order[:20]], [kept[i] for i in order[20:]]]
        a, b = ((directions.hack["m0"][h] - directions.clean["m0"][h]).mean(0) for h in halves)
        slow.append(float(a @ b / a.norm() / b.norm()))
    again = split_half_cosines(
        directions.estimate, directions.hack, directions.clean, MeanDifference(), torch.Generator().manual_seed(5)
    )
    assert again["m0"] == pytest.approx(sum(slow) / 10)


def test_halves_of_several_rows_are_compared_as_planes_and_held_out_pairs_left_alone() -> None:
    directions = made(Svd(k=2, n_heldout=4), pairs=16)
    spoilt = dataclasses.replace(directions, hack={n: f.clone() for n, f in directions.hack.items()})
    for f in spoilt.hack.values():
        f[list(directions.heldout)] *= 1000
    a, b = (summary(d).modules["m1"].split_half for d in (directions, spoilt))
    assert a == b
    assert 0 <= a <= 1


# The summary


@pytest.mark.parametrize("estimator", [MeanDifference(), MeanDifference(standardise=True), Ridge(), Svd(k=2)], ids=str)
@pytest.mark.parametrize("n_heldout", [0, 5])
def test_a_summary_measures_the_scores_of_the_pairs_that_were_held_out(estimator: object, n_heldout: int) -> None:
    directions = made(dataclasses.replace(estimator, n_heldout=n_heldout))
    found = summary(directions)
    index = list(directions.heldout) if n_heldout else list(range(12))
    hack, clean = (scores[index] for scores in directions.pair_scores())
    assert found.auroc == pytest.approx(auroc(hack, clean))
    assert found.effect_size == pytest.approx(effect_size(hack, clean))
    assert found.interval == auroc_interval(found.auroc, len(index), len(index))
    assert found.measured_on == (f"{n_heldout} held-out pairs" if n_heldout else "12 pairs, in sample")
    for name, module in found.modules.items():
        alone = dataclasses.replace(
            directions, rows={name: directions.rows[name]}, hack={name: directions.hack[name]},
            clean={name: directions.clean[name]},
        )  # fmt: skip
        hack, clean = (scores[index] for scores in alone.pair_scores())
        assert module.auroc == pytest.approx(auroc(hack, clean))
        D = (directions.hack[name] - directions.clean[name])[index]
        D = D if directions.scale is None else D / directions.scale[name]
        torch.testing.assert_close(module.spectrum, torch.linalg.svdvals(D))
        assert module.share == pytest.approx(share(directions.rows[name], D))
        assert module.null == pytest.approx(math.sqrt(module.k / (2 * module.d_feature)))


def test_in_sample_figures_flatter_and_held_out_ones_do_not() -> None:
    """No signal at all in 60 coordinates."""
    inside = summary(made(MeanDifference(), signal=0.0, pairs=30, widths=(60,)))
    outside = summary(made(MeanDifference(n_heldout=15), signal=0.0, pairs=30, widths=(60,)))
    assert inside.auroc > 0.9
    assert outside.interval[0] < 0.5 < outside.interval[1]


def test_random_draws_depend_on_the_seed_alone() -> None:
    directions, state = made(MeanDifference()), torch.get_rng_state()
    first, again, other = (summary(directions, seed=seed).modules["m0"].random for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(gr.GradRouteError, match="`draws` should be a positive integer. Found 0"):
        summary(directions, draws=0)


def test_a_summary_reads_as_a_table() -> None:
    directions = made(MeanDifference(n_heldout=4))
    text = str(summary(directions, random_directions(widths=(5, 8), pairs=12), draws=20))
    lines = text.split("\n")
    assert lines[0] == repr(directions)
    assert lines[1] == "measured on 4 held-out pairs"
    assert lines[2].split() == [
        "module",
        "k",
        "x",
        "d",
        "AUROC",
        "effect",
        "halves",
        "share",
        "null",
        "random",
        "95%",
        "S0^2",
        "angle",
    ]
    assert [line.split()[0] for line in lines[3:5]] == ["m0", "m1"]
    assert len({len(line) for line in lines[2:5]}) == 1
    assert "-" not in lines[3].replace("m0", "").split()
    assert lines[5].startswith("all modules: AUROC")
    assert str(summary(directions)).split("\n")[3].split()[-1] == "-"


def test_angles_to_a_predecessor_are_in_the_summary() -> None:
    directions, previous = made(Svd(k=2)), random_directions(k=2, widths=(5, 8), pairs=12)
    found = summary(directions, previous)
    for name, angles in directions.principal_angles(previous).items():
        assert torch.equal(found.modules[name].angles, angles)
        torch.testing.assert_close(angles, principal_angles(directions.rows[name], previous.rows[name]))
    assert summary(directions).modules["m0"].angles is None
    with pytest.raises(gr.errors.RefreshError, match="same modules and shapes"):
        summary(directions, random_directions(widths=(5, 9)))


def test_too_few_pairs_or_an_unknown_estimator_leave_the_halves_out() -> None:
    assert summary(made(TStatistic(), pairs=3)).modules["m0"].split_half is None
    unknown = dataclasses.replace(MADE_OF_NUMBERS, estimator="mine")
    directions = dataclasses.replace(made(MeanDifference()), estimator=None, provenance=unknown)
    assert summary(directions).modules["m0"].split_half is None
    assert summary(directions.random_like(seed=0)).modules["m0"].split_half is None


def test_the_summary_of_a_control_is_of_its_own_sides() -> None:
    directions = made(MeanDifference())
    assert summary(reversed_sign(directions)).auroc == pytest.approx(summary(directions).auroc)
    control = placebo_pairs(directions, seed=0)
    assert summary(control).auroc == pytest.approx(auroc(*control.pair_scores()))


def test_extracted_directions_have_a_summary() -> None:
    found = gr.extract_gradient_directions(routed_mixer(), PAIRS, forward_fn=ids_only, features="parameter")
    assert list(summary(found, draws=5).modules) == ["q", "k", "v", "out"]


# The picture


def test_a_plot_draws_every_module_once_and_on_the_axes_given() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    directions = made(MeanDifference())
    fig, ax = summary(directions).plot()
    points = [
        (x, y) for line in ax.lines if line.get_marker() in ("o", "x") for x, y in zip(*line.get_data(), strict=True)
    ]
    expected = [m.auroc for m in summary(directions).modules.values()]
    assert [y for _, y in sorted(points)] == pytest.approx(expected)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["m0", "m1"]
    fig.canvas.draw()
    own_fig, own = pyplot.subplots()
    assert summary(directions).plot(own) == (own_fig, own)
    colours = {line.get_color() for line in ax.lines}
    assert all(isinstance(c, str) and 0 <= float(c) <= 1 for c in colours)
    pyplot.close("all")


# Validation on labelled rollouts


def test_validation_gives_auroc_and_interval() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0, 0.5])
    labels = torch.tensor([True, True, False, False, False])
    found = validate(scores, labels)
    assert found.auroc == pytest.approx(5 / 6)
    assert (found.low, found.high) == auroc_interval(5 / 6, 2, 3)
    assert (found.n_hack, found.n_clean, found.inverted) == (2, 3, False)


def test_inverted_scores_warn() -> None:
    """As a direction from another distribution was: AUROC .11, and everything looked fine."""
    labels = torch.arange(20) < 6
    scores = normal(20) - 2.0 * labels
    with pytest.warns(
        gr.GradRouteWarning, match=r"inverted on the labelled rollouts: AUROC 0\.\d\d \[0\.\d\d, 0\.\d\d\]"
    ):
        found = validate(scores, labels)
    assert found.inverted
    assert found.auroc < 0.3


def test_scores_that_may_be_inverted_by_chance_warn_too_and_show_the_interval() -> None:
    scores, labels = torch.tensor([1.0, 3.0, 2.0, 4.0]), torch.tensor([True, True, False, False])
    with pytest.warns(gr.GradRouteWarning, match="inverted"):
        found = validate(scores, labels)
    assert found.low < found.auroc == 0.25 < 0.5 < found.high


@pytest.mark.parametrize(
    ("scores", "labels", "found"),
    [
        ([1.0, 2.0], [True, True], "`labels` should hold both kinds. Found 2 hacks and 0 others"),
        ([1.0, 2.0], [False, False], "Found 0 hacks and 2 others"),
        ([1.0, math.nan], [True, False], "`scores` should be finite"),
    ],
)
def test_labels_and_scores_that_say_nothing_raise(scores: list[float], labels: list[bool], found: str) -> None:
    with pytest.raises(gr.GradRouteError, match=found):
        validate(torch.tensor(scores), torch.tensor(labels))


def test_labels_of_another_length_raise() -> None:
    with pytest.raises((gr.GradRouteError, TypeError), match="labels"):
        validate(torch.zeros(3), torch.tensor([True, False]))
