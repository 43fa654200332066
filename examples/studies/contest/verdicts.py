"""The verdicts of a contest: arms with two blocks against permuted flags, random draws and rivals with one block."""

from collections.abc import Mapping

import gradroute as gr
from reporting.arm_data import Results, arm_runs, draws_of, only
from reporting.markdown import markdown_table

ONE_BLOCK = {
    "none": ("likelier-alone",),
    "pairs": ("filter", "penalty", "graded"),
    "two kinds": ("weak-filter", "weak-penalty", "weak-likelier"),
    "half": ("oracle-filter", "oracle-penalty", "oracle-likelier"),
}
"""Labels -> the rivals that have one block and these labels."""
CONTESTS = {
    "explained": ("none", "explained-shuffle", None),
    "route": ("pairs", "shuffle", "random-oriented"),
    "route-explained": ("pairs", "shuffle", None),
    "weak": ("two kinds", "weak-shuffle", None),
    "weak-graft": ("two kinds", "weak-graft-shuffle", None),
    "weak-explained": ("two kinds", "weak-explained-shuffle", None),
    "oracle": ("half", "oracle-shuffle", None),
    "oracle-graft": ("half", "oracle-shuffle", None),
    "oracle-explained": ("half", "oracle-explained-shuffle", None),
}
"""Arm -> (labels, the arm with its flags permuted, the arm with random directions in place of its own)."""


def verdicts(contest: Mapping[str, Results], env: str) -> list[gr.evaluation.Verdict]:
    """On the held-out kinds, corrected over all contests of the environment; none where runs are missing."""
    contests = []
    for arm, (labels, shuffled, random) in CONTESTS.items():
        results = contest[labels]
        needed = [arm_runs(results, env, name) for name in (arm, shuffled, *ONE_BLOCK[labels])]
        needed.append(arm_runs(contest["none"], env, "base"))
        found = [runs for runs in needed if runs is not None]
        common = set.intersection(*(set(runs.runs) for runs in found)) if found else set()
        if len(found) == len(needed) and len(common) >= 3:
            treated, control, *rivals, base = (only(runs, common) for runs in found)
            draws = draws_of(results, env, random, common) if random else ()
            contests.append((treated, gr.evaluation.Controls(control, draws, rivals=rivals, base=base)))
    return gr.evaluation.compare_all(contests, modes="held-out") if contests else []


def verdict_table(contest: Mapping[str, Results], env: str) -> str:
    """One row per contest; empty where none can be judged."""
    rows = []
    for verdict in verdicts(contest, env):
        found = verdict.one_block
        assert found is not None
        arm = verdict.treatment.name
        rows.append(
            [CONTESTS[arm][0], f"`{arm}`", str(len(verdict.treatment.runs)), verdict.word, verdict.because,
             f"`{found.rival}`", found.word, found.because]
        )  # fmt: skip
    header = ["labels", "arm", "runs", "against permuted flags", "why", "best rival with one block", "verdict", "why"]
    return markdown_table(header, rows) if rows else ""
