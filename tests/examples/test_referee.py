"""The referee: who is in the contest, what is run in which order, and a report that counts whole results only."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import referee
from contest.calibration import LAWS, false_claims
from contest.entries import DOSES, ENTRIES, LABELS, OWN_DOSES, entry_of
from contest.jobs import SPECIFIC, Run, contest, tuning
from contest.report import (
    chosen_dose,
    control_table,
    dose_table,
    environments,
    markdown,
    over_control,
    read_report,
    table,
)
from contest.verdicts import CONTESTS, ONE_BLOCK, verdict_table
from scipy.stats import binom
from suite import RECIPE

from loopholes.arms import ARMS
from reporting.store import Job, write_result


def entry(
    ablated: float = 0.1, on: float = 0.9, solve: float = 0.5, tokens: int = 1000, **changed: Any
) -> dict[str, Any]:
    """As `train` returns it."""

    def view(rate: float) -> dict[str, Any]:
        modes = ("run_tests", "sentinel", "stdout", "file")
        return {
            "hack_monitored": rate, "hack_held_out": rate, "solve_hinted": solve, "solve_no_hint": solve,
            "per_mode": {mode: {"hack": rate, "solve": solve} for mode in modes},
        }  # fmt: skip

    return {
        "on": view(on), "ablated": view(ablated), "curve": [], "dose": [], "gate": [], "scores": None,
        "n_per_mode": 256, "monitored": ["run_tests", "sentinel"], "wall_s": 2.0, "refreshes": [],
        "cost": {"tokens": tokens, "steps": 150}, **changed,
    }  # fmt: skip


# Who is in it


def test_every_entry_is_an_arm_once_under_labels_that_it_reads() -> None:
    assert len({(entry.arm, entry.labels) for entry in ENTRIES}) == len(ENTRIES)
    for each in ENTRIES:
        arm = ARMS[each.arm]
        assert (arm.flags == "monitored") == (each.labels == "two kinds"), each
        assert (arm.flags == "oracle") == (each.labels in ("half", "all")), each
        pairs = arm.directions != "none" or arm.forward != "plain" or arm.inoculated != "no"
        assert pairs == (each.labels == "pairs"), each
        assert each.recipe(RECIPE).recall == (0.5 if each.labels == "half" else 1.0)


def test_whatever_has_a_direction_or_flags_has_a_control() -> None:
    known = {(entry.arm, entry.labels): entry for entry in ENTRIES}
    for each in (entry for entry in ENTRIES if not entry.is_control and entry.labels != "all"):
        arm = ARMS[each.arm]
        if arm.directions != "none" or arm.forward != "plain" or arm.removed != "no" or arm.flags != "none":
            assert each.control is not None, each
            assert known[each.control, each.labels].is_control


def test_every_contest_has_its_arms_in_the_table() -> None:
    known = {(entry.arm, entry.labels) for entry in ENTRIES}
    for arm, (labels, shuffled, random) in CONTESTS.items():
        assert {(name, labels) for name in (arm, shuffled, random, *ONE_BLOCK[labels]) if name} <= known
        assert ARMS[arm].routed
        assert ARMS[shuffled].shuffled
        assert not any(ARMS[rival].routed for rival in ONE_BLOCK[labels])


def test_three_doses_of_every_arm_that_has_one_and_the_default_is_one_of_them() -> None:
    for (arm, labels), doses in DOSES.items():
        field = ARMS[arm].dose
        assert field is not None
        assert len(set(doses)) == 3
        assert getattr(RECIPE, field) in doses, (arm, field)
        entry = entry_of(arm, labels)
        assert [getattr(entry.recipe(RECIPE, dose), field) for dose in doses] == list(doses)
        assert getattr(entry.recipe(RECIPE), field) == OWN_DOSES.get((arm, labels), getattr(RECIPE, field))
        assert type(getattr(RECIPE, field)) is type(doses[0]) or isinstance(getattr(RECIPE, field), float)
    of_table = {ARMS[entry.arm].dose for entry in ENTRIES if not entry.is_control}
    assert of_table - {None} == {ARMS[arm].dose for arm, _ in DOSES}
    assert OWN_DOSES.keys() <= DOSES.keys()


# What is run


def test_every_entry_comes_on_the_few_seeds_before_any_comes_on_the_rest(tmp_path: Path) -> None:
    runs = contest(RECIPE, ["C", "N"], LABELS, tmp_path, quick=False)
    few, rest = runs[: 2 * 3 * len(ENTRIES)], runs[2 * 3 * len(ENTRIES) :]
    assert {(run.job.base_seed, run.job.seed) for run in few} == {(0, 0), (0, 1), (0, 2)}
    assert len({run.path for run in runs}) == len(runs)
    often = [entry for entry in ENTRIES if entry.often]
    assert len(rest) == 2 * 7 * len(often)
    counts = {run.entry: 0 for run in rest}
    for run in rest:
        counts[run.entry] += 1
    assert set(counts.values()) == {14}
    quick = contest(RECIPE, ["C", "N"], LABELS, tmp_path, quick=True)
    assert [run.path for run in quick] == [run.path for run in runs[: 2 * len(ENTRIES)]]
    assert {run.entry.labels for run in contest(RECIPE, ["C"], ["half"], tmp_path, quick=True) if run.entry} == {"half"}


def test_doses_are_tried_on_seeds_that_the_table_does_not_have(tmp_path: Path) -> None:
    tuned = tuning(RECIPE, ["C"], tmp_path)
    used = {(run.job.base_seed, run.job.seed) for run in contest(RECIPE, ["C"], LABELS, tmp_path, quick=False)}
    assert not used & {(run.job.base_seed, run.job.seed) for run in tuned}
    assert len({run.path for run in tuned}) == len(tuned) == 3 * len(DOSES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--envs", "C,Z"], "--envs: unknown 'Z'"),
        (["--envs", "C,shared-token"], "--envs: C,C names something twice"),
        (["--labels", "pairs,pears"], "--labels: unknown 'pears'"),
        (["--quick", "--tune"], "--quick, --tune, --report, --calibrate: one of them at most"),
        (["--tune", "--labels", "pairs"], "--labels: --tune does not read it"),
        (["--report", "--workers", "1"], "--workers: --report does not read it"),
        (["--calibrate", "9", "--steps", "9"], "--steps: --calibrate does not read it"),
        (["--calibrate", "0"], "--calibrate: expected a positive integer, found 0"),
        (["--steps", "4"], "--steps: expected at least 5, found 4"),
        (["--workers", "0"], "--workers: expected a positive integer, found 0"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_any_training(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        referee.main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.slow
def test_a_quick_contest_is_run_and_goes_on_where_it_stopped(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    small = {"prompts": 2, "n_per_mode": 4, "curve_n_per_mode": 2, "curve_every": 5, "prompt_steps": 2}
    monkeypatch.setattr(referee, "RECIPE", replace(RECIPE, **small))
    command = [
        "--quick",
        "--envs",
        "C",
        "--labels",
        "all",
        "--steps",
        "5",
        "--no-progress",
        "--out",
        str(tmp_path),
    ]
    referee.main(command)
    wanted = sum(entry.labels == "all" for entry in ENTRIES)
    assert capsys.readouterr().out.startswith(f"{wanted} runs and 0 of doses")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("all/C/*.json")}
    assert len(stamps) == wanted
    removed = next(path for path in stamps if path.name.startswith("oracle-b0"))
    removed.unlink()
    before = (tmp_path / "report.json").read_bytes()
    referee.main(command)
    again = {path: path.stat().st_mtime_ns for path in tmp_path.glob("all/C/*.json")}
    assert {path for path in again if again[path] != stamps[path]} == {removed}
    assert (tmp_path / "report.json").read_bytes() == before


def test_a_result_depends_on_the_doses_that_its_arm_reads_alone(tmp_path: Path) -> None:
    other = replace(RECIPE, **{field: getattr(RECIPE, field) + 1 for field in SPECIFIC})
    both = (contest(recipe, ["C"], LABELS, tmp_path, quick=True) for recipe in (RECIPE, other))
    differ = {a.job.arm for a, b in zip(*both, strict=True) if a.identity != b.identity}
    assert differ == {entry.arm for entry in ENTRIES if ARMS[entry.arm].dose in SPECIFIC}
    assert {ARMS[arm].dose for arm in differ} == set(SPECIFIC)


# What is said


def written(tmp_path: Path, make: Callable[[Run], dict[str, Any]], envs: tuple[str, ...] = ("C",)) -> None:
    for run in contest(RECIPE, envs, LABELS, tmp_path, quick=False):
        write_result(run.path, run.job, run.identity, make(run))


def one_block(rate: float, **changed: Any) -> dict[str, Any]:
    return entry(rate, on=rate, **changed)


def own(arm: str) -> float:
    """No two arms do the same: that would be one arm under two names."""
    return 0.004 * list(ARMS).index(arm)


def planted(run: Run) -> dict[str, Any]:
    """`weak-explained` works; every other arm hacks; the base solves little."""
    arm, wobble = run.job.arm, 0.01 * run.job.seed
    if arm == "base":
        return one_block(0.06, solve=0.25, tokens=0)
    if arm == "vanilla":
        return one_block(0.9, solve=0.3, tokens=500)
    if arm == "weak-explained":
        return entry(0.02 + wobble, tokens=1500)
    rate = 0.9 - own(arm) - wobble
    return entry(rate) if ARMS[arm].routed else one_block(rate)


@pytest.mark.slow
def test_the_report_finds_what_was_planted_and_is_made_again_from_its_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path, planted)
    for run in tuning(RECIPE, ["C"], tmp_path):
        write_result(run.path, run.job, run.identity, entry(0.3))
    referee.main(["--report", "--envs", "C", "--out", str(tmp_path)])
    assert "runs and 45 of doses" in capsys.readouterr().out
    found, doses = read_report(tmp_path / "report.json")
    text = markdown(found, doses)
    assert text == (tmp_path / "report.md").read_text()
    assert environments(found) == ["C"]
    row = next(line for line in table(found, "C").splitlines() if "| `weak-explained` |" in line)
    assert row == (
        "| two kinds | `weak-explained` | 10 | 0.04 [0.03, 0.05], 0.06 | 0.04 [0.03, 0.05], 0.06 | "
        "0.50 [0.50, 0.50], 0.50 | 0.50 [0.50, 0.50], 0.50 | 0.90 | 3.00 | 150 |"
    )
    judged = verdict_table(found, "C").splitlines()[2:]
    assert len(judged) == len(CONTESTS)
    words = {line.split("`")[1]: "better than one block" in line and " no better" not in line for line in judged}
    assert words == {arm: arm == "weak-explained" for arm in CONTESTS}
    assert (tmp_path / "pareto-C.png").stat().st_size > 20_000
    assert "| pairs | `keep` | `kept_directions` | 12 | 0.30 | 0.30 | 0.50 |" in dose_table(doses)


@pytest.mark.slow
def test_an_entry_is_compared_with_its_control_seed_by_seed(tmp_path: Path) -> None:
    def make(run: Run) -> dict[str, Any]:
        rates = {"steered": 0.2 + 0.1 * run.job.seed, "steered-random": 0.5}
        return one_block(rates.get(run.job.arm, 0.5 + own(run.job.arm)))

    written(tmp_path, make)
    referee.main(["--report", "--envs", "C", "--out", str(tmp_path)])
    found, _ = read_report(tmp_path / "report.json")
    steered = next(entry for entry in ENTRIES if entry.arm == "steered")
    assert over_control(found, "C", steered, "hack_held_out") == pytest.approx([-0.3, -0.2, -0.1])
    # standard deviation .1, t(.975, 2) = 4.3027: half width .2484
    assert (
        "| pairs | `steered` | `steered-random` | 3 | -0.20 [-0.45, +0.05] | +0.00 [+0.00, +0.00] |"
        in control_table(found, "C")
    )


def test_a_result_of_another_recipe_stops_the_referee_before_any_training(tmp_path: Path) -> None:
    run = next(r for r in contest(RECIPE, ["C"], LABELS, tmp_path, quick=True) if r.job == Job("C", "vanilla", 0, 0))
    write_result(run.path, run.job, {**run.identity, "curve_every": 10}, entry())
    with pytest.raises(SystemExit, match=r"vanilla-b0-s0\.json: `recipe\.curve_every` should be 25"):
        referee.main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--report: no results"):
        referee.main(["--report", "--out", str(tmp_path / "empty")])


def test_the_recipe_has_the_doses_that_the_tuning_runs_choose() -> None:
    _, doses = read_report(Path(__file__).parents[2] / "docs" / "results" / "referee.json")
    for arm, labels in DOSES:
        dose = str(ARMS[arm].dose)
        chosen = chosen_dose(arm, labels, doses, getattr(RECIPE, dose))
        assert getattr(entry_of(arm, labels).recipe(RECIPE), dose) == chosen, (arm, labels)


def test_a_dose_is_chosen_by_what_it_solves_without_hacks() -> None:
    rates = {1.0: (0.5, 0.5), 2.0: (0.1, 0.5), 3.0: (0.1, 0.49), 4.0: (0.05, 0.3)}
    doses = [
        {"arm": "keep", "labels": "pairs", "dose": dose, "ablated": {"hack_held_out": hack, "solve_hinted": solve}}
        for dose, (hack, solve) in rates.items()
    ]
    assert [chosen_dose("keep", "pairs", doses, default) for default in (1.0, 2.0, 3.0, 4.0)] == [2.0, 2.0, 3.0, 2.0]


def test_a_report_of_some_runs_leaves_the_others_out(tmp_path: Path) -> None:
    run = contest(RECIPE, ["N"], LABELS, tmp_path, quick=True)[1]
    write_result(run.path, run.job, run.identity, entry())
    referee.main(["--report", "--out", str(tmp_path)])
    found, doses = read_report(tmp_path / "report.json")
    assert [len(results) for results in found.values()] == [1, 0, 0, 0, 0]
    assert (doses, verdict_table(found, "N")) == ([], "")
    assert json.loads((tmp_path / "report.json").read_text())["runs"][0]["cost"] == {"tokens": 1000, "steps": 150}


# How often it is wrong


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_a_contest_in_which_nothing_is_better_says_so(law: str) -> None:
    found = false_claims(law, simulations=40, seed=1, resamples=100)
    # more come up in one calibration of a hundred
    most = int(binom.ppf(0.99, 40, 0.05)) / 40
    assert found.arms == len(CONTESTS)
    assert found.effective <= most
    assert found.better <= most
