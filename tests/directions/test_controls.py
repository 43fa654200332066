"""Controls: what they are made of, what stays when they are refreshed, and what a gate makes of them."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch
from support.language_models import MADE_OF_NUMBERS, MODULES, PAIRS, ids_only, random_directions, routed_mixer
from torch import Tensor

import gradroute as gr
from gradroute.directions import placebo_pairs, reversed_sign, shuffled_flags, shuffled_pairs, summary
from gradroute.directions._draws import sides
from gradroute.directions.estimators.mean_difference import MeanDifference
from gradroute.directions.estimators.ridge import Ridge
from gradroute.directions.estimators.svd import Svd

KINDS = {
    "random": lambda d: d.random_like(seed=3),
    "random-oriented": lambda d: d.random_like(seed=3, oriented=True),
    "shuffled": lambda d: shuffled_pairs(d, seed=3),
    "placebo": lambda d: placebo_pairs(d, seed=3),
    "reversed": reversed_sign,
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def real(seed: int = 0, pairs: int = 6, **settings: object) -> gr.Directions:
    """Mean differences (or another estimator's) of random features."""
    drawn = random_directions(seed=seed, pairs=pairs)
    estimator = settings.get("estimator", MeanDifference())
    made = estimator(drawn.hack, drawn.clean)
    return gr.Directions(
        made.rows, drawn.hack, drawn.clean, dataclasses.replace(MADE_OF_NUMBERS, estimator=str(estimator)),
        centre=made.centre, scale=made.scale, heldout=made.heldout, estimator=estimator,
    )  # fmt: skip


class OwnEstimator(MeanDifference):
    """An estimator of the user's, which no name stands for."""

    name = "own"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a.keys() | b.keys())


# What they are


@each_kind
def test_a_control_has_the_pair_features_and_shapes_of_the_real_thing_and_says_what_it_is(kind: str) -> None:
    directions = real()
    control = KINDS[kind](directions)
    assert same(control.hack, directions.hack)
    assert same(control.clean, directions.clean)
    assert not same(control.rows, directions.rows)
    assert control.provenance.control == kind
    assert control.provenance.seed == (None if kind == "reversed" else 3)
    assert ("random" if kind.startswith("random") else "mean_difference") == control.provenance.estimator
    assert kind in repr(control)
    assert directions.provenance.control is None


@pytest.mark.parametrize("kind", ["random", "random-oriented", "shuffled", "placebo"])
def test_a_seed_determines_a_control_and_the_global_generator_is_left_alone(kind: str) -> None:
    directions = real()
    state = torch.get_rng_state()
    made = {
        seed: {
            "random": directions.random_like,
            "random-oriented": lambda s: directions.random_like(s, oriented=True),
            "shuffled": lambda s: shuffled_pairs(directions, s),
            "placebo": lambda s: placebo_pairs(directions, s),
        }[kind](seed)
        for seed in (3, 4)
    }
    assert torch.equal(torch.get_rng_state(), state)
    assert same(made[3].rows, KINDS[kind](directions).rows)
    assert not same(made[3].rows, made[4].rows)


def test_shuffled_pairs_are_half_of_them_swapped() -> None:
    directions = real()
    control = shuffled_pairs(directions, seed=3)
    differences = {name: directions.hack[name] - directions.clean[name] for name in directions.rows}
    found = []
    for subset in range(2**6):
        signs = torch.tensor([-1.0 if subset >> i & 1 else 1.0 for i in range(6)], dtype=torch.float64)
        rows = {name: (signs[:, None] * D).mean(0) for name, D in differences.items()}
        if all(torch.allclose(control.rows[name][0], v / v.norm()) for name, v in rows.items()):
            found.append(int((signs < 0).sum()))
    assert found == [3]


def test_shuffled_rows_have_no_part_in_the_common_difference() -> None:
    """With every pair's difference the same, what is left of it after half the signs are turned is nothing."""
    directions = real()
    hack = {name: f + 100 for name, f in directions.clean.items()}
    jitter = {name: 0.01 * directions.hack[name] for name in hack}
    made = dataclasses.replace(directions, hack={name: hack[name] + jitter[name] for name in hack})
    common = {name: torch.ones(f.shape[1], dtype=torch.float64) / f.shape[1] ** 0.5 for name, f in hack.items()}
    rows = shuffled_pairs(made, seed=0).rows
    assert all(abs(float(rows[name][0] @ common[name])) < 0.9 for name in rows)
    real_rows = MeanDifference()(made.hack, made.clean).rows
    assert all(float(real_rows[name][0] @ common[name]) > 0.99 for name in rows)


def test_placebo_pairs_contrast_prompts_and_use_both_sides_of_them() -> None:
    """Features whose first coordinate is the side and whose second is the prompt: only the second is left."""
    prompts = torch.tensor([0.0, 3.0, 1.0, 7.0], dtype=torch.float64)
    hack = {"m": torch.stack([torch.ones(4, dtype=torch.float64), prompts], dim=1)}
    clean = {"m": torch.stack([-torch.ones(4, dtype=torch.float64), prompts], dim=1)}
    directions = gr.Directions({"m": torch.tensor([[1.0, 0.0]]).double()}, hack, clean, MADE_OF_NUMBERS)
    control = placebo_pairs(directions, seed=0)
    assert torch.allclose(control.rows["m"].abs(), torch.tensor([[0.0, 1.0]]).double())
    high, low = control.pair_scores()
    assert high.mean() > low.mean()
    assert len(high) == len(low) == 4
    assert sorted(torch.cat([high, low]).abs().tolist()) == [0, 0, 1, 1, 3, 3, 7, 7]


def test_both_sides_of_a_placebo_pair_are_of_one_kind() -> None:
    directions = real(pairs=7)
    hack = {name: torch.ones_like(f) for name, f in directions.hack.items()}
    clean = {name: torch.zeros_like(f) for name, f in directions.hack.items()}
    high, low = sides(hack, clean, "placebo", 3)
    for name in hack:
        assert len(high[name]) == 6
        assert torch.equal(high[name], low[name])
        assert high[name].mean() == 0.5


def test_the_estimator_of_fresh_directions_is_taken_over() -> None:
    """Loaded directions may not know theirs, and their controls have to repeat it."""
    estimator = OwnEstimator()
    loaded = dataclasses.replace(real(estimator=estimator), estimator=None)
    fresh = real(1, estimator=estimator)
    loaded.update_(fresh, step=1)
    assert same(shuffled_pairs(loaded, seed=3).rows, shuffled_pairs(fresh, seed=3).rows)


def test_reversed_rows_are_negated_and_score_the_sides_exchanged() -> None:
    directions = real(estimator=Ridge())
    control = reversed_sign(directions)
    for name, rows in directions.rows.items():
        assert torch.equal(control.rows[name], -rows)
    hack, clean = directions.pair_scores()
    torch.testing.assert_close(control.pair_scores(), (-clean, -hack))


def test_oriented_random_rows_are_turned_so_that_each_scores_hack_above_clean() -> None:
    directions = real(estimator=MeanDifference(standardise=True))
    plain, turned = directions.random_like(5), directions.random_like(5, oriented=True)
    flipped = []
    for name in directions.rows:
        gap = ((directions.hack[name] - directions.clean[name]) / directions.scale[name]).mean(0)
        assert float(turned.rows[name][0] @ gap) > 0
        assert torch.equal(turned.rows[name].abs(), plain.rows[name].abs())
        flipped.append(not torch.equal(turned.rows[name], plain.rows[name]))
    assert any(flipped)


def test_orientation_does_not_look_at_held_out_pairs() -> None:
    directions = real(estimator=MeanDifference(n_heldout=2))
    other = dataclasses.replace(directions, hack={n: f.clone() for n, f in directions.hack.items()})
    for f in other.hack.values():
        f[list(directions.heldout)] *= -100
    for seed in range(5):
        a, b = (d.random_like(seed, oriented=True) for d in (directions, other))
        assert same(a.rows, b.rows)


@pytest.mark.parametrize("estimator", [MeanDifference(standardise=True), Ridge(), Svd(k=2)], ids=str)
@pytest.mark.parametrize("kind", ["shuffled", "placebo"])
def test_a_control_repeats_the_estimator(kind: str, estimator: object) -> None:
    control = KINDS[kind](real(estimator=estimator))
    assert (control.scale is None) == isinstance(estimator, Svd)
    hack, clean = control.pair_scores()
    assert hack.mean() > clean.mean()


def test_a_control_of_a_control_raises() -> None:
    for make in KINDS.values():
        with pytest.raises(gr.GradRouteError, match="made from real directions. Found a reversed one"):
            make(reversed_sign(real()))


def test_one_pair_cannot_be_shuffled() -> None:
    for kind in ("shuffled", "placebo"):
        with pytest.raises(gr.GradRouteError, match=f"A {kind} control should have two or more pairs.*Found 1"):
            KINDS[kind](real(pairs=1))


def test_an_estimator_that_is_not_known_cannot_be_repeated() -> None:
    directions = real(estimator=OwnEstimator())
    assert shuffled_pairs(directions, seed=0).rows["m0"].shape == (1, 4)
    forgotten = dataclasses.replace(directions, estimator=None)
    with pytest.raises(gr.GradRouteError, match="A shuffled control repeats the estimator.*freshly extracted"):
        shuffled_pairs(forgotten, seed=0)


# Refreshed on the schedule of what they control


@each_kind
@pytest.mark.parametrize("estimator", [MeanDifference(), Ridge(n_heldout=1)], ids=str)
def test_a_refreshed_control_stays_what_it_is(kind: str, estimator: object) -> None:
    control, fresh = KINDS[kind](real(0, estimator=estimator)), real(1, estimator=estimator)
    before = dict(control.rows)
    made = control.provenance
    control.update_(fresh, step=7)
    assert (control.version, control.step, control.provenance) == (1, 7, made)
    assert same(control.hack, fresh.hack)
    assert control.heldout == fresh.heldout or kind == "placebo"
    if kind == "random":
        assert same(control.rows, before)
    elif kind == "random-oriented":
        assert all(torch.equal(control.rows[n].abs(), before[n].abs()) for n in before)
        z = {n: (fresh.hack[n] - fresh.clean[n])[[i for i in range(6) if i not in fresh.heldout]] for n in before}
        scale = fresh.scale or dict.fromkeys(before, 1.0)
        assert all(float(control.rows[n][0] @ (z[n] / scale[n]).mean(0)) > 0 for n in before)
    else:
        assert same(control.rows, KINDS[kind](fresh).rows)
        assert not same(control.rows, before)
    if estimator.name == "ridge" and kind in ("random", "reversed"):
        assert same(control.scale, fresh.scale)


@each_kind
def test_the_refresher_refreshes_a_control_and_sees_a_stale_extraction(kind: str) -> None:
    model = routed_mixer()

    def extract() -> gr.Directions:
        return gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)

    with gr.ablate_quarantine(model):
        stale = extract()
        control = KINDS[kind](extract())
    refresher = gr.Refresher(control, extract, model=model, every=1)
    with torch.no_grad():
        for _, parameter in gr.deployed_parameters(model):
            parameter.add_(0.1)
    refresher.step()
    with gr.ablate_quarantine(model):
        assert same(control.hack, extract().hack)
    assert (control.version, control.provenance.control) == (1, kind)
    frozen = gr.Refresher(KINDS[kind](stale), lambda: stale, model=model, every=1)
    with torch.no_grad():
        for _, parameter in gr.deployed_parameters(model):
            parameter.add_(0.1)
    with pytest.raises(gr.errors.RefreshError, match="bitwise the same"):
        frozen.step()


def test_an_extraction_that_makes_the_control_itself_is_taken_over() -> None:
    control = shuffled_pairs(real(0), seed=3)
    control.update_(shuffled_pairs(real(1), seed=3), step=1)
    assert same(control.rows, shuffled_pairs(real(1), seed=3).rows)
    for other in (shuffled_pairs(real(2), seed=4), placebo_pairs(real(2), seed=3), reversed_sign(real(2))):
        with pytest.raises(gr.errors.RefreshError, match="`fresh` should have the (seed|control)"):
            control.update_(other, step=2)
    with pytest.raises(gr.errors.RefreshError, match="control.*None. Found 'reversed'"):
        real(0).update_(reversed_sign(real(1)), step=1)


def test_directions_of_another_estimator_refresh_no_control_but_a_random_one() -> None:
    fresh = real(1, estimator=Ridge())
    with pytest.raises(gr.errors.RefreshError, match="estimator.*'mean_difference'. Found 'ridge'"):
        shuffled_pairs(real(0), seed=3).update_(fresh, step=1)
    control = real(0).random_like(seed=3)
    control.update_(fresh, step=1)
    assert same(control.scale, fresh.scale)


@each_kind
def test_a_file_brings_a_control_back(kind: str, tmp_path: Path) -> None:
    control = KINDS[kind](real(estimator=Ridge(n_heldout=2)))
    control.save(tmp_path / "control.safetensors")
    loaded = gr.Directions.load(tmp_path / "control.safetensors")
    assert loaded.provenance == control.provenance
    for group in ("rows", "hack", "clean", "centre", "scale"):
        assert same(getattr(loaded, group), getattr(control, group))
    assert loaded.heldout == control.heldout
    assert repr(loaded) == repr(control)
    torch.testing.assert_close(loaded.pair_scores(), control.pair_scores(), rtol=0, atol=0)
    for directions in (loaded, control):
        directions.update_(real(1, estimator=Ridge(n_heldout=2)), step=1)
    assert same(loaded.rows, control.rows)


# Gates


@pytest.mark.parametrize("kind", ["shuffled", "placebo", "reversed"])
def test_a_gate_is_not_turned_around_on_a_control(kind: str) -> None:
    """Turned around, the reversed control would be the real thing."""
    directions = real()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gate, true = gr.BandGate(KINDS[kind](directions)), gr.BandGate(directions)
    assert not gate.reversed
    if kind == "reversed":
        hack, _ = directions.pair_scores()
        torch.testing.assert_close(gate.z(-hack), 1 - true.z(hack))


# Flags


def test_shuffled_flags_keep_their_number_in_every_group_and_come_anywhere() -> None:
    flags = torch.tensor([True, True, False, False, True, False, False, False, True, True, True, True])
    counts = torch.zeros(12)
    for seed in range(300):
        shuffled = shuffled_flags(flags, seed=seed, group_size=4)
        assert shuffled.reshape(3, 4).sum(1).tolist() == [2, 1, 4]
        counts += shuffled
    expected = torch.tensor([0.5] * 4 + [0.25] * 4 + [1.0] * 4)
    torch.testing.assert_close(counts / 300, expected, rtol=0, atol=0.12)
    whole = [shuffled_flags(flags, seed=seed) for seed in range(20)]
    assert {int(f.sum()) for f in whole} == {7}
    assert len({int(f[8:].sum()) for f in whole}) > 1


def test_flags_are_shuffled_by_their_seed_alone() -> None:
    flags = torch.arange(16) % 3 == 0
    state = torch.get_rng_state()
    assert torch.equal(shuffled_flags(flags, seed=1), shuffled_flags(flags, seed=1))
    assert not torch.equal(shuffled_flags(flags, seed=1), shuffled_flags(flags, seed=2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("group_size", [5, 0, -4])
def test_groups_that_do_not_divide_the_rows_raise(group_size: int) -> None:
    with pytest.raises(gr.GradRouteError, match=f"`group_size` should divide the 16 rows. Found {group_size}"):
        shuffled_flags(torch.ones(16, dtype=torch.bool), seed=0, group_size=group_size)


def test_extracted_directions_have_every_control() -> None:
    model = routed_mixer()
    made = gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only, estimator=Svd(k=2))
    for kind, make in KINDS.items():
        assert list(make(made).rows) == MODULES, kind


@each_kind
def test_an_odd_number_of_pairs_has_every_control(kind: str) -> None:
    control = KINDS[kind](real(pairs=7))
    hack, clean = control.pair_scores()
    assert len(hack) == len(clean) == (6 if kind == "placebo" else 7)
    control.update_(real(1, pairs=7), step=1)
    assert summary(control, draws=5).modules.keys() == {"m0", "m1"}
