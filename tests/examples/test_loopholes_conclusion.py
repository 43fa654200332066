"""The sentences at the end of the main job: what they say of planted rates, and the arms that `--help` explains."""

from pathlib import Path
from typing import Any

import grpo_loopholes
import pytest
import suite

from loopholes.arms import ARMS, groups
from loopholes.conclusion import conclusion
from loopholes.environment import ENVIRONMENTS
from loopholes.names import ABOUT, NAMES, letter_of, title_of


def run(arm: str, monitored: float, held_out: float, solved: float, seed: int = 0) -> dict[str, Any]:
    rates = {"hack_monitored": monitored, "hack_held_out": held_out, "solve_hinted": solved, "solve_no_hint": 0.0}
    on = {**rates, "hack_monitored": 0.99, "hack_held_out": 0.98, "solve_hinted": 0.01}
    names = {"arm": arm, "seed": seed, "base_seed": 0, "env": "C", "monitored": ["tests", "exit"], "n_per_mode": 100}
    return {**names, "on": on, "ablated": rates}


BASE = run("base", 0.06, 0.07, 0.25)


def test_the_treatment_is_set_against_plain_grpo_and_the_true_reward() -> None:
    runs = [BASE, run("vanilla", 0.95, 0.96, 0.0), run("clean", 0.0, 0.01, 0.49), run("route", 0.03, 0.05, 0.41)]
    first, seeds = conclusion(runs, usual_steps=150, steps=150)
    assert first == (
        "Deployed, `route` leaves 3 to 5 % hacks, where plain GRPO (`vanilla`) leaves 95 to 96 %; it solves 41 % of "
        "the tasks with a hint, training on the true reward (`clean`) 49 %, and the model before training 25 %."
    )
    assert seeds.startswith("One seed shows what can happen.")


def test_what_was_not_run_is_not_spoken_of() -> None:
    (said, _) = conclusion([BASE, run("route", 0.03, 0.03, 0.41)], usual_steps=150, steps=150)
    assert said.startswith("Deployed, `route` leaves 3 % hacks; it solves 41 %")
    assert "vanilla" not in said
    assert "clean" not in said


@pytest.mark.parametrize(("hacks", "solved", "as_good"), [(0.05, 0.40, True), (0.60, 0.41, False), (0.03, 0.05, False)])
def test_a_control_that_does_as_well_is_named(hacks: float, solved: float, as_good: bool) -> None:
    runs = [BASE, run("route", 0.03, 0.05, 0.41), run("random-oriented", hacks, 0.02, solved)]
    said = conclusion(runs, usual_steps=150, steps=150)[1]
    assert said.startswith("Control: `random-oriented` (a random direction, each module's sign from the pairs) leaves ")
    assert ("That is as good as `route`" in said) == as_good


def test_arms_with_one_block_and_the_same_flags_follow() -> None:
    runs = [BASE, run("weak", 0.3, 0.9, 0.2), run("weak-penalty", 0.0, 0.96, 0.24)]
    said = conclusion(runs, usual_steps=150, steps=150)
    assert said[1].startswith("One block: `weak-penalty` (plain LoRA; ")
    assert said[1].endswith("leaves 0 to 96 % and solves 24 %.")


def test_short_runs_and_several_seeds_are_said_to_be_so() -> None:
    runs = [run(arm, 0.05, 0.05, 0.4, seed) for seed in range(5) for arm in ("base", "route")]
    assert conclusion(runs, usual_steps=150, steps=20)[1:] == [
        "This was a short run: 20 of 150 steps. Its rates are not those of a trained policy."
    ]
    assert conclusion(runs[:4], usual_steps=150, steps=150)[1].startswith("2 seeds show what can happen.")


def test_environments_go_by_name_and_by_letter(tmp_path: Path) -> None:
    assert sorted(NAMES.values()) == sorted(ENVIRONMENTS)
    for name, letter in NAMES.items():
        assert letter_of(name) == letter_of(letter) == letter
        assert title_of(letter) == f"{name} ({letter})"
        assert title_of(letter) in ABOUT
        assert grpo_loopholes.parse_arguments(["--env", name, "--out", str(tmp_path)]).env == letter
        assert suite.parse_arguments(["--envs", name, "--out", str(tmp_path)]).envs == [letter]


def test_help_explains_every_arm_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(arm for arms in groups().values() for arm in arms) == sorted(ARMS)
    with pytest.raises(SystemExit):
        grpo_loopholes.parse_arguments(["--help"])
    printed = capsys.readouterr().out
    for name, arm in ARMS.items():
        assert [line for line in printed.splitlines() if line.split()[:1] == [name] and line.endswith(arm.about)]
