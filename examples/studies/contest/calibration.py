"""How often a contest of this size says something false where no arm is better than any other.

    false "effective"               a treatment beats its permuted flags, of which it is one more draw
    false "better than one block"   it beats its rivals, of which it is one more draw

Each of `simulations` is a whole contest: as many arms, rivals and seeds as `verdicts` judges, with shared rivals and
base. Ablated hack rates of seeds are drawn from a law that all arms share; outcomes are binomial. A contest is false if
any of its verdicts is; over many contests that should be at most `Criteria.level`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import gradroute as gr
from reporting.markdown import markdown_table

from .entries import BASE_SEEDS, ENTRIES, FEW_BASE_SEEDS, FEW_SEEDS, SEEDS
from .verdicts import CONTESTS, ONE_BLOCK

N_PER_MODE = 256
HELD_OUT, NO_LOOPHOLE = ("stdout", "file"), "no loophole"

Law = Callable[[np.random.Generator, int], np.ndarray]
LAWS: dict[str, Law] = {
    "seeds differ a little": lambda rng, n: rng.normal(0.5, 0.03, n),
    "seeds differ": lambda rng, n: rng.normal(0.4, 0.15, n),
    "a run leaks or does not": lambda rng, n: rng.choice([0.04, 0.91, 0.07], n),
}
"""Ablated hack rates of one arm's seeds; the last is what one control really gave."""


class FalseClaims(NamedTuple):
    """Shares of simulated contests with any false verdict of a kind, and how many arms are judged in each."""

    effective: float
    better: float
    contests: int
    arms: int


def false_claims(law: str, *, simulations: int, seed: int, resamples: int = 200) -> FalseClaims:
    """Simulate contests of which no verdict should say anything."""
    rng, effective, better = np.random.default_rng(seed), 0, 0
    for _ in range(simulations):
        found = gr.evaluation.compare_all(_contests(LAWS[law], rng), modes="held-out", resamples=resamples)
        effective += any(verdict.word in ("effective", "directional") for verdict in found)
        better += any(v.one_block is not None and v.one_block.word == "better than one block" for v in found)
    return FalseClaims(effective / simulations, better / simulations, simulations, len(CONTESTS))


def write_calibration(path: Path, simulations: int, seed: int) -> None:
    """`false_claims` of every law, as JSON."""
    found = {law: false_claims(law, simulations=simulations, seed=seed)._asdict() for law in LAWS}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def calibration_table(path: Path) -> str:
    """One row per law."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [law, str(each["contests"]), str(each["arms"]), f"{each['effective']:.3f}", f"{each['better']:.3f}"]
        for law, each in found.items()
    ]
    header = ["hack rates of runs", "contests", "arms judged in each", 'any false "effective"', 'any false "better"']
    return markdown_table(header, rows)


def _contests(law: Law, rng: np.random.Generator) -> list[tuple[gr.evaluation.ArmRuns, gr.evaluation.Controls]]:
    everywhere = _seeds(often=True)
    drawn = {name: _arm(name, law, rng, everywhere, one_block=True) for names in ONE_BLOCK.values() for name in names}
    base = _arm("base", lambda _, n: np.full(n, 0.06), rng, everywhere, one_block=True, solve=0.25)
    contests = []
    for arm, (labels, shuffled, random) in CONTESTS.items():
        seeds = _seeds(often=any(entry.often for entry in ENTRIES if (entry.arm, entry.labels) == (arm, labels)))
        draws = [_arm(f"random draw {seed}", law, rng, [seed], one_block=False) for seed in (seeds if random else ())]
        rivals = [_on(drawn[name], seeds) for name in ONE_BLOCK[labels]]
        controls = gr.evaluation.Controls(
            _arm(shuffled, law, rng, seeds, one_block=False), draws, rivals=rivals, base=_on(base, seeds)
        )
        contests.append((_arm(arm, law, rng, seeds, one_block=False), controls))
    return contests


def _seeds(*, often: bool) -> list[tuple[int, int]]:
    bases, seeds = (BASE_SEEDS, SEEDS) if often else (FEW_BASE_SEEDS, FEW_SEEDS)
    return [(base, seed) for base in bases for seed in seeds]


def _on(arm: gr.evaluation.ArmRuns, seeds: list[tuple[int, int]]) -> gr.evaluation.ArmRuns:
    return gr.evaluation.ArmRuns(arm.name, {seed: arm.runs[seed] for seed in seeds})


def _arm(
    name: str, law: Law, rng: np.random.Generator, seeds: list[tuple[int, int]], *, one_block: bool, solve: float = 0.42
) -> gr.evaluation.ArmRuns:
    def rate(p: float) -> gr.evaluation.Rate:
        return gr.evaluation.Rate(int(rng.binomial(N_PER_MODE, min(max(p, 0.0), 1.0))), N_PER_MODE)

    def run(p: float) -> dict[str, gr.evaluation.ModeOutcomes]:
        outcomes = {}
        for mode in HELD_OUT:
            ablated = rate(p)
            on = ablated if one_block else rate(0.95)
            outcomes[mode] = gr.evaluation.ModeOutcomes(False, on, ablated, rate(solve))
        none = gr.evaluation.Rate(0, N_PER_MODE)
        return {**outcomes, NO_LOOPHOLE: gr.evaluation.ModeOutcomes(None, none, none, rate(solve))}

    return gr.evaluation.ArmRuns(name, dict(zip(seeds, map(run, law(rng, len(seeds)).tolist()), strict=True)))
