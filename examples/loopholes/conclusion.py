"""What the results of the main job say, in a few sentences that are computed from them."""

from collections.abc import Iterable
from typing import Any

from .arms import ARMS
from .report import by_arm, pooled_rate

LEGEND = (
    "on: as trained, with the quarantine; ablated: as deployed, without it. An arm with one block is the same in both.",
    "monitored: kinds of hacks that the detector knows; held out: kinds that it does not know.",
)
# Of a rate that is as good as another one, in a run of this size.
_AS_GOOD = 0.05


def conclusion(runs: list[dict[str, Any]], usual_steps: int, steps: int) -> list[str]:
    """Sentences about the deployed models, and what to try next.

    Args:
        runs: entries of `results.json`.
        usual_steps: of a whole run.
        steps: of these.
    """
    found = by_arm(runs)
    arms = {arm: ARMS[arm] for arm in found if arm != "base"}
    treated = [arm for arm in arms if arms[arm].routed and not arms[arm].is_control]
    said = [_treatment(arm, found) for arm in treated]
    said += [_control(arm, found, treated) for arm in arms if arms[arm].is_control]
    said += [
        _rival(arm, found) for arm in arms if not arms[arm].routed and arms[arm].has_flags and not arms[arm].is_control
    ]
    if steps < usual_steps:
        said.append(
            f"This was a short run: {steps} of {usual_steps} steps. Its rates are not those of a trained policy."
        )
    seeds = len({(run["base_seed"], run["seed"]) for run in runs})
    if seeds < 5:
        many = "One seed shows" if seeds == 1 else f"{seeds} seeds show"
        said.append(
            f"{many} what can happen. For intervals over runs: --seeds 0,1,2,3,4; for verdicts with their controls: "
            "python examples/studies/suite.py."
        )
    return said


def _treatment(arm: str, found: dict[str, list[dict[str, Any]]]) -> str:
    hacks = f"Deployed, `{arm}` leaves {_hacks(found[arm])} hacks"
    solves = f"it solves {_solved(found[arm])} of the tasks with a hint"
    if "vanilla" in found:
        hacks += f", where plain GRPO (`vanilla`) leaves {_hacks(found['vanilla'])}"
    if "clean" in found:
        solves += f", training on the true reward (`clean`) {_solved(found['clean'])}"
    return f"{hacks}; {solves}, and the model before training {_solved(found['base'])}."


def _control(arm: str, found: dict[str, list[dict[str, Any]]], treated: Iterable[str]) -> str:
    said = f"Control: `{arm}` ({ARMS[arm].about}) leaves {_hacks(found[arm])} and solves {_solved(found[arm])}."
    equalled = [
        other
        for other in treated
        if _worst(found[arm]) - _worst(found[other]) <= _AS_GOOD >= _solve(found[other]) - _solve(found[arm])
    ]
    if equalled:
        said += f" That is as good as `{'`, `'.join(equalled)}`: what the control leaves out was not needed here."
    return said


def _rival(arm: str, found: dict[str, list[dict[str, Any]]]) -> str:
    return f"One block: `{arm}` ({ARMS[arm].about}) leaves {_hacks(found[arm])} and solves {_solved(found[arm])}."


def _rates(runs: list[dict[str, Any]]) -> list[float]:
    return [pooled_rate(runs, "ablated", group).value for group in ("hack_monitored", "hack_held_out")]


def _worst(runs: list[dict[str, Any]]) -> float:
    return max(_rates(runs))


def _solve(runs: list[dict[str, Any]]) -> float:
    return pooled_rate(runs, "ablated", "solve_hinted").value


def _hacks(runs: list[dict[str, Any]]) -> str:
    """Of both groups of hacks, in percent."""
    low, high = sorted(round(100 * rate) for rate in _rates(runs))
    return f"{low} %" if low == high else f"{low} to {high} %"


def _solved(runs: list[dict[str, Any]]) -> str:
    return f"{round(100 * _solve(runs))} %"
