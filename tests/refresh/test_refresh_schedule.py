"""When a `Refresher` fires: every so many steps, after a warm-up; and what is no schedule."""

from itertools import pairwise

import pytest
import torch
from support.language_models import MODULES, optimizer_for, routed_mixer, train_step
from support.refreshing import REFUSED, ablated, activations, bottleneck_gradients, control, move, refresher

import gradroute as gr

pytestmark = pytest.mark.touches_peft

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


# Warm-up


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "`every` should be a positive integer. Found 0"),
        ({"warm_up": -1}, "`warm_up` should be an integer from 0 on. Found -1"),
        ({"warm_up": True}, "warm_up"),
    ],
)
def test_schedules_that_could_not_work_raise(settings: dict[str, object], message: str) -> None:
    with pytest.raises(REFUSED, match=message):
        refresher(routed_mixer(), **settings)
