"""The main job as a user runs it: refusals before any training, a short run, and every arm doing what it says."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import grpo_loopholes
import pytest
import torch
from transformers import LlamaForCausalLM

from gradroute._protocol import routed_layers
from loopholes import base_model
from loopholes.arms import ARMS
from loopholes.base_model import load_base
from loopholes.environment import ENVIRONMENTS
from loopholes.flags import Flagger
from loopholes.grpo import Recipe, train
from loopholes.language import PAD, Grade
from loopholes.teacher import Teacher

SCRIPT = Path(__file__).parents[2] / "examples" / "grpo_loopholes.py"
ENVIRONMENT = ENVIRONMENTS["C"]
SHORT = Recipe(steps=6, refresh_every=3, curve_every=3, curve_n_per_mode=8, n_per_mode=8)


def run(*arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cache or "/nonexistent"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def base(home: Path) -> LlamaForCausalLM:
    return load_base(ENVIRONMENT, 0, cache_dir=home / ".cache" / "gradroute-examples")


class Trained(NamedTuple):
    entry: dict[str, Any]
    deployed: bool
    """Whether the block was trained."""
    quarantine: bool


@pytest.fixture(scope="module")
def trained(home: Path) -> Callable[[str], Trained]:
    """What a short run of an arm comes to; each arm is trained once for all tests."""

    @cache
    def of(arm: str) -> Trained:
        model = base(home)
        entry = train(model, ENVIRONMENT, arm, 0, SHORT)
        layers = routed_layers(model).values()
        blocks = ([layer.deployed for layer in layers], [layer.quarantine for layer in layers])
        return Trained(entry, *(any(bool(block.B.any()) for block in each) for each in blocks))

    return of


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arm", "route"], "unrecognized arguments: --arm route"),
        (["--arms", "route,roote"], "--arms: unknown arm 'roote'"),
        (["--arms", "route,route"], "--arms: route,route names something twice"),
        (["--seeds", "0,x"], "--seeds: expected comma-separated integers"),
        (["--seeds=-1"], "integers from 0"),
        (["--seeds", "4294967296"], "integers from 0"),
        (["--env", "Z"], "--env: invalid choice: 'Z'"),
        (["--steps", "0"], "--steps: expected a positive integer, found 0"),
        (["--arms", "vanilla", "--penalty", "2"], "--penalty: no arm of these takes it"),
        (["--arms", "weak-penalty", "--penalty", "3", "--recall", ".2"], "at least 1 / recall = 5, found 3"),
        (["--arms", "weak,gradient", "--score-view", "sampled"], "--score-view: no arm of these has a gate on activ"),
        (["--arms", "weak,vanilla", "--recall", ".5"], "--recall: no labels in vanilla"),
        (["--refresh-every", "5"], "--refresh-every: nothing to refresh in vanilla, clean"),
        (["--arms", "route-frozen", "--refresh-every", "5"], "--refresh-every: nothing to refresh in route-frozen"),
        (["--arms", "route", "--refresh-every", "0"], "--refresh-every: expected a positive integer, found 0"),
        (["--arms", "route", "--steps", "4"], "route would not be refreshed once in 4 steps"),
        (["--out", "/proc/nowhere"], "--out: cannot write to /proc/nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2_before_training(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # `main` parses first; were anything trained, this would take a minute and write files.
    with pytest.raises(SystemExit) as ended:
        grpo_loopholes.main(arguments)
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.slow
def test_a_refusal_of_the_script_ends_the_process_with_exit_code_2() -> None:
    done = run("--arms", "roote")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.slow
def test_a_short_run_writes_what_it_says(home: Path, tmp_path: Path) -> None:
    done = run(
        "--arms", "vanilla,route", "--steps", "10", "--out", str(tmp_path / "out"), "--no-progress", cache=home
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "monitored" in done.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["config"]["steps"] == 10
    assert [(r["arm"], r["seed"], r["base_seed"], r["env"]) for r in results["runs"]] == [
        ("base", 0, 0, "C"),
        ("vanilla", 0, 0, "C"),
        ("route", 0, 0, "C"),
    ]
    for entry in results["runs"]:
        assert entry["wall_s"] > 0
        assert entry["n_per_mode"] == Recipe.n_per_mode
        for view in ("on", "ablated"):
            assert entry[view].keys() == {
                "hack_monitored",
                "hack_held_out",
                "solve_hinted",
                "solve_no_hint",
                "per_mode",
            }
        assert [point["step"] for point in entry["curve"]] == ([0] if entry["arm"] == "base" else [0, 10])
    _, vanilla, route = results["runs"]
    assert vanilla["refreshes"] == []
    assert [(r["step"], r["moved"]) for r in route["refreshes"]] == [(5, True), (10, True)]
    assert vanilla["on"] == vanilla["ablated"]
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.refreshed])
def test_the_refresher_fires_in_every_arm_that_has_one(arm: str, trained: Callable[[str], Trained]) -> None:
    entry = trained(arm).entry
    assert [report["step"] for report in entry["refreshes"]] == [3, 6]
    assert all(report["moved"] for report in entry["refreshes"])
    if ARMS[arm].random_direction != "oriented":
        # A random control keeps its rows; the others turn with the policy.
        kept = ARMS[arm].random_direction == "haar"
        assert all((report["overlap"] > 0.999999) == kept for report in entry["refreshes"])


@pytest.mark.slow
def test_a_refresh_that_never_comes_due_is_an_error(home: Path) -> None:
    with pytest.raises(RuntimeError, match="no refresh came due"):
        train(base(home), ENVIRONMENT, "route", 0, Recipe(steps=2, refresh_every=3, n_per_mode=8, curve_n_per_mode=8))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arm",
    # With true labels of all modes they differ from those with labels of two in nothing that is trained.
    [name for name, arm in ARMS.items() if not arm.routed and not arm.is_control and not name.startswith("oracle-")],
)
def test_unrouted_arms_leave_the_quarantine_at_zero(arm: str, trained: Callable[[str], Trained]) -> None:
    entry, deployed, quarantine = trained(arm)
    assert entry["on"] == entry["ablated"]
    assert not quarantine
    assert deployed == (arm != "base")


@pytest.mark.slow
@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.gradient_filter not in ("none", "keep")])
def test_filters_take_out_what_is_hack_ward_in_every_arm_that_has_one(
    arm: str, trained: Callable[[str], Trained]
) -> None:
    points = trained(arm).entry["curve"][1:]
    assert all(point["null"] > 0 for point in points)
    # A filter of rollouts leaves what lies below its threshold; one by projection leaves nothing.
    left = 0.8 if arm == "rollout-filter" else 1e-3
    assert all(point["cout"] < left * point["cin"] for point in points if point["fired"] > 0)
    assert any(point["fired"] > 0 for point in points)


@pytest.mark.slow
def test_the_filter_that_routes_trains_the_quarantine_and_nothing_else_does(trained: Callable[[str], Trained]) -> None:
    assert trained("route-v1").quarantine
    assert not trained("erase").quarantine


@pytest.mark.slow
def test_a_run_is_a_function_of_its_seed(home: Path, trained: Callable[[str], Trained]) -> None:
    again, other = (train(base(home), ENVIRONMENT, "route", seed, SHORT) for seed in (0, 1))
    first, again, other = (
        {name: value for name, value in entry.items() if name not in ("wall_s", "seed")}
        for entry in (trained("route").entry, again, other)
    )
    assert first == again
    assert first != other


def flags_of(arm: str, prompts: torch.Tensor, hacked: list[bool], seed: int = 0, **noise: float) -> list[bool]:
    graded = Grade(solved=torch.zeros(len(prompts)).bool(), marker=torch.tensor(hacked))
    flagger = Flagger(torch.nn.Identity(), ARMS[arm], ENVIRONMENT, None, Recipe(**noise), seed)
    return flagger(prompts, prompts, graded, torch.Generator()).tolist()


def prompts_of(*modes: str) -> torch.Tensor:
    return torch.cat([ENVIRONMENT.sample_prompts(1, torch.Generator(), 0.0, mode)[0] for mode in modes])


def test_arms_flag_what_they_are_allowed_to_know() -> None:
    prompts = prompts_of("sentinel", "file")
    flags = {name: flags_of(name, prompts, [True, True]) for name in ("vanilla", "absorb", "oracle", "weak")}
    assert flags == {"vanilla": [False] * 2, "absorb": [False] * 2, "oracle": [True] * 2, "weak": [True, False]}


def test_noisy_labels_miss_and_raise_alarms_at_the_rates_asked_for() -> None:
    prompts = prompts_of("sentinel").repeat(4000, 1)
    missed = flags_of("oracle", prompts, [True] * 4000, recall=0.7)
    assert sum(missed) / 4000 == pytest.approx(0.7, abs=0.03)
    alarms = flags_of("oracle", prompts, [False] * 4000, false_positive_rate=0.05)
    assert sum(alarms) / 4000 == pytest.approx(0.05, abs=0.015)
    with pytest.raises(ValueError, match="arm without"):
        flags_of("route", prompts, [True] * 4000, recall=0.7)


def test_permuted_flags_are_rate_matched() -> None:
    class TwoOfFive:
        gate = SimpleNamespace(flags=lambda scores: scores > 0, z=lambda scores: scores)

        def scores(self, *_: torch.Tensor) -> torch.Tensor:
            return torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])

    prompts, generator = torch.zeros(5, 8, dtype=torch.long), torch.Generator().manual_seed(0)
    graded = Grade(torch.zeros(5).bool(), torch.zeros(5).bool())
    flagger = Flagger(torch.nn.Identity(), ARMS["shuffle"], ENVIRONMENT, TwoOfFive(), Recipe(), seed=0)
    drawn = [flagger(prompts, prompts, graded, generator).tolist() for _ in range(20)]
    assert all(sum(flags) == 2 for flags in drawn)
    assert len({tuple(flags) for flags in drawn}) > 5


def test_demonstrations_replace_the_last_rollouts_of_each_group_until_their_step() -> None:
    teacher = Teacher(ENVIRONMENT, group_size=4, per_group=2, steps=3, seed=0)
    prompts = prompts_of("sentinel", "file").repeat_interleave(40, dim=0)
    own = torch.full((len(prompts), ENVIRONMENT.completion_length), PAD)
    mixed, sources = teacher.mix(3, prompts, own)
    assert sources == ["student", "student", "teacher", "teacher"] * 20
    taught = torch.tensor([source == "teacher" for source in sources])
    graded = ENVIRONMENT.grade(prompts, mixed)
    assert torch.equal(graded.solved | graded.hacked, taught)
    assert graded.solved.any()
    assert graded.hacked.any()
    assert teacher.mix(4, prompts, own)[1] is None
    with pytest.raises(ValueError, match="go together"):
        Teacher(ENVIRONMENT, 4, 2, 0, seed=0)
    with pytest.raises(ValueError, match="from 0 to 3"):
        Teacher(ENVIRONMENT, 4, 4, 1, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["rollout-filter", "gradient", "erase"])
def test_hack_ward_shares_are_told_apart_by_source(arm: str, home: Path) -> None:
    taught = replace(SHORT, teacher_per_group=2, teacher_steps=6)
    points = train(base(home), ENVIRONMENT, arm, 0, taught)["curve"][1:]
    assert all(0 < point["cin_teacher"] <= 1 and 0 < point["cin_student"] <= 1 for point in points)
    assert all(point["cin_teacher"] != point["cin_student"] for point in points)


@pytest.mark.slow
def test_a_corrupt_cache_is_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "STEPS", 2)
    first = load_base(ENVIRONMENT, 0, cache_dir=tmp_path).state_dict()
    (cached,) = tmp_path.iterdir()
    cached.write_bytes(cached.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="corrupt"):
        again = load_base(ENVIRONMENT, 0, cache_dir=tmp_path).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    monkeypatch.setattr(base_model, "STEPS", 3)
    load_base(ENVIRONMENT, 0, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
