"""The suite: refusals, resuming after a kill, and a report that counts whole results only."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import suite

from loopholes.arms import ARMS
from reporting.staleness import loss_table, write_staleness
from reporting.store import Job, ResultError, read_result, write_result
from reporting.suite_report import cell, draw_table, markdown, one_block_table, read_report, verdicts, write_report

SCRIPT = Path(__file__).parents[2] / "examples" / "studies" / "suite.py"
COMMAND = ["--arms", "vanilla,clean", "--seeds", "0,1", "--base-seeds", "0", "--steps", "1", "--no-progress"]


def start(home: Path, *arguments: str) -> "subprocess.Popen[str]":
    environment = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(home / ".cache"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "route,roote"], "--arms: unknown 'roote'"),
        (["--envs", "C,Z"], "--envs: unknown 'Z'"),
        (["--monitored", "file,fil"], "--monitored: unknown 'fil'"),
        (["--seeds", "0,1,0"], "--seeds: 0,1,0 names something twice"),
        (["--base-seeds", "1,1"], "--base-seeds: 1,1 names something twice"),
        (["--seeds", "x"], "--seeds: expected comma-separated integers"),
        (["--seeds=-1"], "integers from 0"),
        (["--arms", "route", "--steps", "4"], "--steps: expected at least 5 for route"),
        (["--arms", "route", "--recall", ".5"], "--recall, --false-positive-rate: no labels in route"),
        (["--arms", "weak", "--recall", "1.5"], "--recall: expected a rate from 0 to 1, found 1.5"),
        (["--arms", "weak,weak-likelier", "--penalty", "2"], "--penalty: no arm of these takes it"),
        (["--arms", "weak,weak-filter", "--nats", "2"], "--nats: no arm of these takes it"),
        (["--arms", "weak,gradient", "--score-view", "sampled"], "--score-view: no arm of these takes it"),
        (["--arms", "weak-penalty", "--penalty", "0"], "--penalty: expected at least 1 / recall = 1, found 0"),
        (["--arms", "weak-penalty", "--penalty", "3", "--recall", ".2"], "at least 1 / recall = 5, found 3"),
        (["--arms", "weak-likelier", "--nats", "nan"], "--nats: expected a positive number, found nan"),
        (["--arms", "weak", "--inoculation-steps", "2"], "--inoculation-steps: no arm of these takes it"),
        (["--arms", "inoculated", "--inoculation-steps", "0"], "--inoculation-steps: expected a positive integer"),
        (["--monitored", "run_tests,sentinel,stdout,file"], "--monitored: expected one mode to be held out"),
        (["--teacher", "2"], "--teacher: expected two integers"),
        (["--teacher", "8,5"], "--teacher: expected two integers, the first below 8"),
        (["--teacher", "2,0"], "--teacher: expected two integers, both positive or both 0"),
        (["--lr", "0"], "--lr: expected a number from 0 to 1"),
        (["--workers", "0"], "--workers: expected a positive integer"),
    ],
)
def test_what_cannot_be_done_is_one_line_before_any_training(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        suite.main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.slow
def test_a_suite_that_was_killed_goes_on_and_gives_the_same_report(home: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = start(home, *COMMAND, "--out", str(whole))
    output, errors = done.communicate(timeout=300)
    assert (done.returncode, errors) == (0, ""), errors
    assert "6 runs" in output

    broken = start(home, *COMMAND, "--workers", "1", "--out", str(killed))
    deadline = time.monotonic() + 200
    while not list(killed.rglob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    broken.kill()
    broken.communicate()
    # Its worker, of the same group, ends by itself.
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(broken.pid, 0)
            time.sleep(0.05)
    finished = list(killed.rglob("*.json"))
    assert 1 <= len(finished) < 6
    # As a kill in the middle of writing leaves it: never counted.
    (killed / "C" / "clean-b0-s1.part").write_text('{"version": 1, "jo')
    stamps = {path: path.stat().st_mtime_ns for path in finished}

    again = start(home, *COMMAND, "--out", str(killed))
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert {path: path.stat().st_mtime_ns for path in finished} == stamps
    for name in ("report.md", "report.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert {path.name for path in whole.glob("*.png")} == {path.name for path in killed.glob("*.png")} != set()


def entry(hack: float = 0.9, ablated: float = 0.1, **changed: Any) -> dict[str, Any]:
    """As `train` returns it."""

    def view(rate: float) -> dict[str, Any]:
        modes = ("run_tests", "sentinel", "stdout", "file")
        return {
            "hack_monitored": rate,
            "hack_held_out": rate,
            "solve_hinted": 0.5,
            "solve_no_hint": 0.5,
            "per_mode": {mode: {"hack": rate, "solve": 0.5} for mode in modes},
        }

    point = {"step": 0, "on": view(0.05), "ablated": view(0.05)}
    return {
        "on": view(hack),
        "ablated": view(ablated),
        "curve": [point, {**point, "step": 25}],
        "dose": [{"scale": s, "hack_monitored": s, "hack_held_out": s, "solve_hinted": 0.5} for s in (0.0, 0.5, 1.0)],
        "gate": [],
        "scores": None,
        "n_per_mode": 512,
        "monitored": ["run_tests", "sentinel"],
        "wall_s": 1.0,
        "refreshes": [],
        "cost": {"tokens": 1000, "steps": 5},
        **changed,
    }


JOB = Job("C", "route", 0, 3)


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = JOB.path(tmp_path)
    write_result(path, JOB, {"steps": 5, "betas": (0.9, 0.99)}, entry(ablated=1 / 3))
    found = read_result(path, JOB, {"steps": 5, "betas": (0.9, 0.99)})
    assert found["ablated"]["hack_monitored"] == round(1 / 3, 5)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda result: "{", "cannot be read as JSON"),
        (lambda result: "[]", "should hold an object"),
        (lambda result: {**result, "version": 0}, "`version` should be 1. Found 0"),
        (lambda result: {**result, "job": {**result["job"], "seed": 4}}, "`job.seed` should be 3. Found 4"),
        (lambda result: {**result, "recipe": {"steps": 6}}, "`recipe.steps` should be 5. Found 6"),
        (lambda result: {**result, "recipe": {"steps": 5, "x": 1}}, "`recipe.x` should be None. Found 1"),
        (lambda result: {k: v for k, v in result.items() if k != "entry"}, "`entry.on` is missing"),
        (
            lambda result: {**result, "entry": {**result["entry"], "on": {}}},
            "`entry.on.hack_monitored` should be a rate",
        ),
        (
            lambda result: {
                **result,
                "entry": {**result["entry"], "on": {**result["entry"]["on"], "solve_no_hint": 1.5}},
            },
            "`entry.on.solve_no_hint` should be a rate. Found 1.5",
        ),
    ],
)
def test_a_result_that_cannot_be_counted_names_the_file_and_the_field(
    damage: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path
) -> None:
    path = JOB.path(tmp_path)
    write_result(path, JOB, {"steps": 5}, entry())
    damaged = damage(json.loads(path.read_text()))
    path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    with pytest.raises(ResultError) as error:
        read_result(path, JOB, {"steps": 5})
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_a_corrupt_result_stops_the_suite_before_any_training(tmp_path: Path) -> None:
    path = Job("C", "vanilla", 0, 0).path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text('{"version": 1, "job"')
    with pytest.raises(SystemExit, match=r"vanilla-b0-s0\.json: cannot be read as JSON"):
        suite.main([*COMMAND, "--out", str(tmp_path)])


def results(ablated: dict[str, list[float]]) -> dict[Job, dict[str, Any]]:
    found = {}
    for arm, rates in ablated.items():
        for seed, rate in enumerate(rates):
            job = Job("C", arm, 0, seed)
            # Without a second block both views are one.
            write = entry(hack=0.85 + 0.02 * seed if ARMS[arm].routed else rate, ablated=rate)
            found[job] = {**write, "overlaps": []}
    return found


def test_verdicts_are_held_to_both_controls() -> None:
    suppressed = {"route": [0.02, 0.03, 0.05, 0.03, 0.06], "shuffle": [0.8, 0.7, 0.75, 0.82, 0.7]}
    text = verdicts(results(suppressed), "C")
    assert "| route | held-out | effective |" in text
    failing = results({**suppressed, "random-oriented": [0.8, 0.75, 0.7, 0.85, 0.8]})
    assert "| route | held-out | directional |" in verdicts(failing, "C")
    as_good = results({**suppressed, "random-oriented": [0.05, 0.04, 0.03, 0.05, 0.02]})
    assert "| route | held-out | effective |" in verdicts(as_good, "C")
    few = results({**suppressed, "random-oriented": [0.05, 0.04]})
    assert "(Random draws: 2, of the 5 that are needed" in verdicts(few, "C")
    assert "(Random draws:" not in verdicts(as_good, "C")
    assert verdicts(results({"route": [0.02, 0.03, 0.05]}), "C") == ""


def test_a_cell_shows_mean_interval_and_worst_run() -> None:
    # t(.975, 2) = 4.3027, standard deviation .1, three runs: half width .24842
    assert cell([0.2, 0.3, 0.4]) == "0.30 [0.05, 0.55], 0.40"
    assert cell([0.2, 0.3]) == "0.20 0.30"


@pytest.mark.slow
def test_the_report_can_be_made_again_from_its_json(tmp_path: Path) -> None:
    found = results({arm: [0.1 + 0.006 * i, 0.2, 0.3 + 0.004 * i] for i, arm in enumerate(ARMS)})
    write_report(tmp_path, found, {"steps": 5})
    assert markdown(read_report(tmp_path / "report.json")) == (tmp_path / "report.md").read_text()


def test_an_arm_is_judged_against_rivals_with_its_labels_where_all_were_run() -> None:
    base = {"base": [0.07, 0.06, 0.08], "weak-explained-shuffle": [0.9, 0.92, 0.88]}
    rivals = {"weak-filter": [0.9, 0.91, 0.93], "weak-penalty": [0.95, 0.96, 0.94], "weak-likelier": [0.3, 0.31, 0.29]}
    better = results({**base, **rivals, "weak-explained": [0.02, 0.03, 0.04]})
    for job, entry in better.items():
        if job.arm == "base":
            entry["ablated"] = {**entry["ablated"], "solve_no_hint": 0.2}
            modes = entry["ablated"]["per_mode"]
            entry["ablated"]["per_mode"] = {mode: {**found, "solve": 0.2} for mode, found in modes.items()}
    table = one_block_table(better, "C")
    assert "| weak-explained | held-out | 3 | effective | weak-likelier | better than one block |" in table
    without = {job: entry for job, entry in better.items() if job.arm != "weak-likelier"}
    assert one_block_table(without, "C") == ""
    few = {job: entry for job, entry in better.items() if job.seed < 2}
    assert one_block_table(few, "C") == ""


def test_a_report_of_arms_that_some_figures_leave_out_has_the_others(tmp_path: Path) -> None:
    write_report(tmp_path, results({"clean": [0.1, 0.2]}), {"steps": 5})
    assert {path.name for path in tmp_path.glob("*.png")} == {"bars-C.png", "pareto-C.png", "training-C.png"}


def test_a_report_of_what_lies_there_needs_no_list_of_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="--report: no results"):
        suite.main(["--report", "--out", str(tmp_path)])
    known = suite.identity(suite.RECIPE, None)
    for job in (Job("C", "route", 0, 3), Job("A", "route-v1", 1, 0)):
        write_result(job.path(tmp_path), job, known, entry())
    suite.main(["--report", "--out", str(tmp_path)])
    assert capsys.readouterr().out.startswith("2 runs, 2 s of training")
    assert set(read_report(tmp_path / "report.json")) == {Job("C", "route", 0, 3), Job("A", "route-v1", 1, 0)}
    for option, field in (("--steps=7", "steps"), ("--recall=.5", "recall"), ("--monitored=file", "monitored")):
        with pytest.raises(SystemExit, match=rf"`recipe.{field}` should be "):
            suite.main(["--report", option, "--out", str(tmp_path)])
    for name in ("C/notes", "C/roote-b0-s0", "Z/route-b0-s0", "C/route-b0-sx"):
        stray = tmp_path / f"{name}.json"
        stray.parent.mkdir(exist_ok=True)
        stray.write_text("{}")
        with pytest.raises(SystemExit, match=rf"{name}\.json: should be named"):
            suite.main(["--report", "--out", str(tmp_path)])
        stray.unlink()


def drifting(arm: str, ablated: list[float], overlap: float, **share: float | None) -> dict[Job, dict[str, Any]]:
    start = {name: value for name, value in entry()["curve"][0].items() if name != "step"}
    curve = [{"step": step, "overlap_first": overlap**step, **share, **start} for step in (0, 1, 2, 3)]
    return {
        Job("C", arm, 0, seed): {**entry(ablated=rate, curve=curve), "overlaps": []}
        for seed, rate in enumerate(ablated)
    }


def test_frozen_directions_are_compared_with_refreshed_ones_run_by_run(tmp_path: Path) -> None:
    found = drifting("route", [0.0, 0.1, 0.2], 0.5, cin_student=0.25, cin_teacher=0.75)
    found |= drifting("route-frozen", [0.1, 0.2, 0.6], 0.25)
    write_report(tmp_path, found, {"steps": 3})
    write_staleness(tmp_path, read_report(tmp_path / "report.json"))
    text = (tmp_path / "staleness.md").read_text()
    # differences .1, .1, .4: mean .2, standard deviation .17321, t(.975, 2) = 4.3027
    assert "| route | 3 | +0.20 [-0.23, +0.63] | +0.20 [-0.23, +0.63] | +0.00 [+0.00, +0.00] |" in text
    assert (
        "| route | 3 | 0.10 [0.00, 0.35], 0.20 | 0.10 [0.00, 0.35], 0.20 | 0.50 [0.50, 0.50], 0.50 | 0.50 | 0.25 |"
        in text
    )
    assert "| 0.25 | 0.06 | 0.02 |" in text
    assert "| arm | runs | student, step 1 | teacher, step 1 |" in text
    assert "| route | 3 | 0.25 | 0.75 | 0.25 | 0.75 | 0.25 | 0.75 |" in text
    assert (tmp_path / "staleness-C.png").exists()


def test_what_first_directions_would_cost_is_shown_by_overlap_and_each_run_counts_once() -> None:
    found = drifting("route", [0.0, 0.1], 0.5, auroc_fresh=0.9, auroc_first=0.8)
    found |= drifting("graded-frozen", [0.1], 0.5, auroc_fresh=0.8, auroc_first=0.3)
    results = {job: {**entry, "drift": entry["curve"][1:]} for job, entry in found.items()}
    jobs = list(results)
    parts = [{job: results[job] for job in jobs[:1]}, {job: results[job] for job in jobs[1:]}]
    assert loss_table("C", *parts) == loss_table("C", results)
    rows = loss_table("C", results).splitlines()[2:]
    # overlaps .5, .25, .125 at steps 1, 2, 3; losses .1, .1, .5: mean .2333, standard deviation .2309, t 4.3027
    expected = "| 3 | 0.87 | 0.63 | +0.23 [-0.34, +0.81] |"
    ranges = ("0.4 to 0.6", "0.2 to 0.4", "below 0.2")
    assert rows == [f"| activations | all | {shown} {expected}" for shown in ranges]
    assert loss_table("C", {}) == loss_table("N", results) == ""


def test_an_auroc_without_hacks_is_left_out_of_the_mean(tmp_path: Path) -> None:
    found = drifting("route", [0.0], 0.5, auroc_held_out=None) | drifting("route-frozen", [0.1], 0.25)
    for job, entry in drifting("route", [0.0, 0.0, 0.0], 0.5, auroc_held_out=0.75).items():
        found.setdefault(job, entry)
    write_report(tmp_path, found, {"steps": 3})
    write_staleness(tmp_path, read_report(tmp_path / "report.json"))
    row = next(line for line in (tmp_path / "staleness.md").read_text().splitlines() if line.startswith("| route | 3"))
    assert row.endswith("| 0.75 | 0.75 | 0.75 |")


def test_random_draws_are_shown_one_by_one_with_their_auroc(tmp_path: Path) -> None:
    found = drifting("random", [0.1, 0.6], 1.0, auroc_held_out=0.75) | drifting("route", [0.0], 1.0)
    write_report(tmp_path, found, {"steps": 3})
    text = draw_table(read_report(tmp_path / "report.json"), "C")
    assert "| random | 0 | 1 | - | 0.75 | 0.60 | 0.60 | 0.50 |" in text
    assert "| route | 0 | 0 | - | - | 0.00 | 0.00 | 0.50 |" in text


def test_staleness_needs_both_arms(tmp_path: Path) -> None:
    write_report(tmp_path, drifting("route", [0.0, 0.1, 0.2], 0.5), {"steps": 3})
    write_staleness(tmp_path, read_report(tmp_path / "report.json"))
    assert not (tmp_path / "staleness.md").exists()
