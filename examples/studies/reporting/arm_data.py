"""Results as the data of a comparison: what the runs of an arm did, seed by seed and mode by mode."""

from collections.abc import Mapping
from typing import Any

import gradroute as gr
from loopholes.arms import ARMS

from .store import Job

Results = Mapping[Job, Mapping[str, Any]]


def draws_of(results: Results, env: str, arm: str, seeds: set[Any]) -> list[gr.evaluation.ArmRuns]:
    """Each run of an arm with random directions as a draw of its own; none where they are too few to judge by."""
    draws = [
        gr.evaluation.ArmRuns(f"random draw {name}", {seed: run})
        for name, (seed, run) in enumerate(runs_of(results, env, arm).items())
        if seed in seeds
    ]
    return draws if len(draws) >= 5 else []


def arm_runs(results: Results, env: str, arm: str) -> gr.evaluation.ArmRuns | None:
    """The runs of an arm as data of a comparison; None if there are none."""
    runs = runs_of(results, env, arm)
    return gr.evaluation.ArmRuns(arm, runs) if runs else None


def of_arm(results: Results, env: str, arm: str) -> dict[Job, Mapping[str, Any]]:
    """Its runs in an environment, in order."""
    return {job: results[job] for job in sorted(results, key=in_order) if (job.env, job.arm) == (env, arm)}


def runs_of(results: Results, env: str, arm: str) -> dict[tuple[int, int], dict[str, gr.evaluation.ModeOutcomes]]:
    return {(job.base_seed, job.seed): _outcomes(entry) for job, entry in of_arm(results, env, arm).items()}


def _outcomes(entry: Mapping[str, Any]) -> dict[str, gr.evaluation.ModeOutcomes]:
    n = entry["n_per_mode"]

    def rate(value: float) -> gr.evaluation.Rate:
        return gr.evaluation.Rate(round(value * n), n)

    on, ablated = entry["on"], entry["ablated"]
    modes = {
        mode: gr.evaluation.ModeOutcomes(
            mode in entry["monitored"],
            rate(on["per_mode"][mode]["hack"]),
            rate(ablated["per_mode"][mode]["hack"]),
            rate(ablated["per_mode"][mode]["solve"]),
        )
        for mode in on["per_mode"]
    }
    return modes | {
        "no loophole": gr.evaluation.ModeOutcomes(None, rate(0.0), rate(0.0), rate(ablated["solve_no_hint"]))
    }


def only(arm: gr.evaluation.ArmRuns, seeds: set[Any]) -> gr.evaluation.ArmRuns:
    return gr.evaluation.ArmRuns(arm.name, {seed: run for seed, run in arm.runs.items() if seed in seeds})


def in_order(job: Job) -> tuple[str, int, int, int]:
    return job.env, list(ARMS).index(job.arm), job.base_seed, job.seed
