"""When a `Refresher` fires: every so many steps, after a warm-up, below an overlap; and what is no schedule."""

from itertools import pairwise

import pytest
import torch
from support.language_models import MODULES, PAIRS, ids_only, optimizer_for, routed_mixer, train_step
from support.refreshing import REFUSED, ablated, activations, bottleneck_gradients, control, move, refresher

import gradroute as gr
from gradroute.directions import reversed_sign, shuffled_pairs

# Every so many steps


@pytest.mark.parametrize("every", [1, 2, 5])
def test_it_extracts_once_every_so_many_steps(every: int) -> None:
    model, calls = routed_mixer(), []

    def extract() -> gr.Directions:
        calls.append(made.steps)
        return activations(model)

    made = refresher(model, extract, every=every)
    reports = []
    for _ in range(10):
        move(model)
        reports.append(made.step())
    due = list(range(every, 11, every))
    assert calls == due
    assert [i + 1 for i, report in enumerate(reports) if report is not None] == due
    assert [report for report in reports if report is not None] == made.reports


def test_every_five_steps_is_the_default() -> None:
    assert refresher(routed_mixer()).every == 5


@pytest.mark.parametrize(
    ("make", "extract"),
    [
        (ablated, activations),
        (control, activations),
        (lambda m: ablated(m, bottleneck_gradients), bottleneck_gradients),
    ],
    ids=["activation", "random", "gradient"],
)
def test_it_fires_in_training_with_every_kind_of_directions(make, extract) -> None:
    model = routed_mixer()
    optimizer, directions = optimizer_for(model), make(model)
    gate = gr.BandGate(directions)
    made = gr.Refresher(directions, lambda: extract(model), model=model, every=2)
    rows, ends, features = dict(directions.rows), [gate.ends], [directions.hack["out"]]
    for step in range(6):
        train_step(model, optimizer, seed=step)
        report = made.step()
        assert (report is not None) == (step % 2 == 1)
        if report is not None:
            ends.append(gate.ends)
            features.append(directions.hack["out"])
    assert [(report.step, report.age, report.moved, report.version) for report in made.reports] == [
        (2, 2, True, 1), (4, 2, True, 2), (6, 2, True, 3)
    ]  # fmt: skip
    assert len(set(ends)) == 4
    assert not any(torch.equal(a, b) for a, b in pairwise(features))
    kept = all(torch.equal(directions.rows[name], rows[name]) for name in MODULES)
    assert kept == (make is control)
    fresh = ablated(model, extract)
    assert all(torch.equal(directions.hack[name], fresh.hack[name]) for name in MODULES)


# Warm-up and overlap


@pytest.mark.parametrize(("warm_up", "due"), [(0, [2, 4, 6, 8]), (2, [2, 4, 6, 8]), (3, [3, 5, 7]), (7, [7])])
def test_no_refresh_is_due_during_the_warm_up(warm_up: int, due: list[int]) -> None:
    model = routed_mixer()
    made = refresher(model, every=2, warm_up=warm_up)
    for _ in range(8):
        expected = next(step for step in (*due, 9) if step > made.steps) - made.steps
        assert f"next in {expected}" in repr(made) or expected + made.steps == 9
        move(model)
        made.step()
    assert [report.step for report in made.reports] == due


def test_a_warm_up_counts_the_steps_of_the_run() -> None:
    model = routed_mixer()
    directions = ablated(model).update_(ablated(model), step=40)
    made = gr.Refresher(directions, lambda: activations(model), model=model, every=1, warm_up=41)
    move(model)
    assert made.step().step == 41


def test_after_a_refresh_with_a_low_overlap_the_next_step_is_due() -> None:
    model = routed_mixer()
    made = refresher(model, every=4, min_overlap=0.9)
    jumps = {4: 2.0, 5: 2.0}
    for step in range(1, 11):
        move(model, by=jumps.get(step, 1e-4))
        made.step()
    assert [report.step for report in made.reports] == [4, 5, 6, 10]
    low = [report.overlap < 0.9 for report in made.reports]
    assert low == [True, True, False, False]
    assert "every 4 steps or below an overlap of 0.9" in repr(made)


def test_a_probe_calls_for_a_refresh_when_it_has_turned() -> None:
    model, probes = routed_mixer(), []

    def probe() -> gr.Directions:
        probes.append(model.q.view)
        return gr.extract_activation_directions(model, PAIRS[:2], forward_fn=ids_only)

    made = refresher(model, every=None, min_overlap=0.95, probe=probe)
    for step in range(1, 7):
        move(model, by=1.0 if step in (3, 4) else 1e-4)
        made.step()
    assert [report.step for report in made.reports] == [3, 4]
    assert len(probes) == 1 + 6 + 2
    assert set(probes) == {"ablated"}
    assert "Refresher(below an overlap of 0.95, 2 done, age 2)" in repr(made)


def test_a_probe_is_compared_with_itself_at_the_last_refresh() -> None:
    """Slow drift adds up: no step turns it by much."""
    model = routed_mixer()
    made = refresher(model, every=None, min_overlap=0.98, probe=lambda: activations(model))
    for _ in range(12):
        move(model, by=0.02)
        made.step()
    assert made.reports
    assert made.reports[0].step > 1
    assert all(report.overlap < 0.98 for report in made.reports)


def test_a_random_control_has_the_schedule_of_the_probe() -> None:
    steps = []
    for make in (ablated, control):
        model = routed_mixer()
        made = gr.Refresher(
            make(model), lambda model=model: activations(model), model=model,
            every=None, min_overlap=0.95, probe=lambda model=model: activations(model),
        )  # fmt: skip
        for _ in range(8):
            move(model, by=0.1)
            made.step()
        steps.append([report.step for report in made.reports])
    assert steps[0] == steps[1] != []


def test_a_probe_that_does_not_see_the_policy_move_raises() -> None:
    model = routed_mixer()
    frozen = ablated(model)
    made = refresher(model, every=None, min_overlap=0.9, probe=lambda: frozen)
    made.step()
    move(model)
    with pytest.raises(gr.errors.RefreshError, match="`probe` returned bitwise the same rows"):
        made.step()


def test_a_probe_that_fails_leaves_the_directions_as_they_were() -> None:
    model, broken = routed_mixer(), []

    def probe() -> gr.Directions | None:
        return None if broken else activations(model)

    def extract() -> gr.Directions:
        broken.append(True)
        return activations(model)

    made = refresher(model, extract, every=1, min_overlap=0.9, probe=probe)
    move(model)
    with pytest.raises(gr.errors.RefreshError, match="`probe` should return Directions. Found NoneType"):
        made.step()
    assert made.directions.version == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": None}, "`every` or `min_overlap` should be given"),
        ({"warm_up": -1}, "`warm_up` should be a number of steps"),
        ({"warm_up": True}, "warm_up"),
        ({"min_overlap": 1.1}, "`min_overlap` should be a cosine"),
        ({"min_overlap": -1.0}, "`min_overlap` should be a cosine"),
        ({"min_overlap": float("nan")}, "`min_overlap` should be a cosine"),
        ({"every": None, "min_overlap": 0.9}, "`min_overlap` without `probe`"),
        ({"probe": lambda: None}, "`probe` needs a `min_overlap`"),
        ({"min_overlap": 0.9, "probe": 3}, "probe"),
    ],
)
def test_schedules_that_could_not_work_raise(settings: dict[str, object], message: str) -> None:
    with pytest.raises(REFUSED, match=message):
        refresher(routed_mixer(), **settings)


@pytest.mark.parametrize(
    "make", [control, lambda m: shuffled_pairs(ablated(m), seed=0), lambda m: reversed_sign(ablated(m))]
)
def test_the_overlap_of_a_control_is_no_schedule(make) -> None:
    model = routed_mixer()
    with pytest.raises(gr.errors.RefreshError, match="control with itself is not that of the directions it controls"):
        gr.Refresher(make(model), lambda: activations(model), model=model, min_overlap=0.9)
