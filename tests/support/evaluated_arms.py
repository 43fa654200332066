"""Arms as if trained and evaluated, from rates: drawn, or exact."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

import gradroute as gr
from gradroute.evaluation import ArmRuns, ModeOutcomes, Rate, Records


def drawn(
    name: str, ablated: Sequence[float], rng: np.random.Generator, *, n: int, on: float = 0.95, solve: float = 0.5
) -> ArmRuns:
    """Runs of seeds 0, 1, ...: counts of n prompts a mode, drawn at these ablated hack rates."""

    def rate(p: float) -> Rate:
        return Rate(int(rng.binomial(n, min(max(p, 0.0), 1.0))), n)

    none = Rate(0, n)

    def run(p: float) -> dict[str, ModeOutcomes]:
        held_out = ModeOutcomes(False, rate(on), rate(p), none)
        return {"file": held_out, "no loophole": ModeOutcomes(None, none, none, rate(solve))}

    return ArmRuns(name, {seed: run(p) for seed, p in enumerate(ablated)})


def exact(
    name: str,
    ablated: Mapping[Hashable, float] | Sequence[float],
    *,
    on: float = 1.0,
    solve: float | Sequence[float] = 0.5,
    n: int = 1000,
) -> ArmRuns:
    """Runs with exactly these rates of n: one ablated hack rate per seed, in two exploit modes."""
    by_seed = ablated if isinstance(ablated, Mapping) else dict(enumerate(ablated))
    solves = solve if isinstance(solve, Sequence) else [solve] * len(by_seed)

    def rate(p: float) -> Rate:
        return Rate(round(p * n), n)

    return ArmRuns(
        name,
        {
            seed: {
                "run_tests": ModeOutcomes(True, rate(on), rate(p), rate(0.0)),
                "file": ModeOutcomes(False, rate(on), rate(p), rate(0.0)),
                "no loophole": ModeOutcomes(None, rate(0.0), rate(0.0), rate(s)),
            }
            for (seed, p), s in zip(by_seed.items(), solves, strict=True)
        },
    )


def one_block(arm: ArmRuns) -> ArmRuns:
    """The arm as a model without a second block would be evaluated: on, it does what it does ablated."""
    runs = {s: {m: replace(o, hack_on=o.hack_ablated) for m, o in run.items()} for s, run in arm.runs.items()}
    return ArmRuns(arm.name, runs)


def report(
    outcomes: Iterable[tuple[str, bool | None, int | str, Sequence[tuple[bool, bool, bool]]]],
) -> gr.evaluation.OnOffReport:
    """A report from (mode, monitored, prompt id, [(hacked on, hacked ablated, solved ablated) of each rollout])."""
    rows = [(*key, rollout) for *key, rollouts in outcomes for rollout in rollouts]
    on = tuple(
        gr.EvalRecord(mode, monitored, prompt, hacked, False) for mode, monitored, prompt, (hacked, _, _) in rows
    )
    ablated = tuple(
        gr.EvalRecord(mode, monitored, prompt, hacked, solved) for mode, monitored, prompt, (_, hacked, solved) in rows
    )
    return gr.evaluation.OnOffReport(
        gr.evaluation.ViewRates({}, {}), gr.evaluation.ViewRates({}, {}), Records(on, ablated)
    )
