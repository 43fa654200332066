"""What the library's own comparison says of the arms of a study."""

import gradroute as gr
from reporting.markdown import markdown_table

from .evaluation import mode_outcomes
from .tables import Results, of_arm

PERMUTED = {"route": "shuffle", "weak": "shuffle", "weak-explained": "weak-explained-shuffle"}
"""The arm with permuted flags that each is judged by."""


def verdicts(results: Results, variant: str) -> str:
    """Arms with flags against permuted flags (`gr.evaluation.compare_all`); route against random draws, if five."""
    draws = [
        gr.evaluation.ArmRuns(f"draw {job.draw} of seed {job.seed}", {job.seed: mode_outcomes(entry["outcomes"])})
        for job, entry in of_arm(results, variant, "random-oriented").items()
        if job.seed in _arm_runs(results, variant, PERMUTED["route"])
    ]
    lines = []
    for modes in ("held-out", "all"):
        contests = []
        for arm, permuted in PERMUTED.items():
            shuffled = _arm_runs(results, variant, permuted)
            treated = {seed: run for seed, run in _arm_runs(results, variant, arm).items() if seed in shuffled}
            if treated:
                control = gr.evaluation.ArmRuns(permuted, {seed: shuffled[seed] for seed in treated})
                known = [draw for draw in draws if set(draw.runs) <= set(treated)] if arm == "route" else []
                contests.append(
                    (
                        gr.evaluation.ArmRuns(arm, treated),
                        gr.evaluation.Controls(control, known if len(known) >= 5 else ()),
                    )
                )
        if contests:
            lines += [
                [v.treatment.name, modes, v.word, v.because] for v in gr.evaluation.compare_all(contests, modes=modes)
            ]
    note = "" if len(draws) >= 5 else f"\n\n(Random draws: {len(draws)}, of the 5 that a verdict on a direction needs.)"
    return markdown_table(["arm", "markers", "verdict", "why"], lines) + note if lines else ""


def _arm_runs(results: Results, variant: str, arm: str) -> dict[int, dict[str, gr.evaluation.ModeOutcomes]]:
    return {job.seed: mode_outcomes(entry["outcomes"]) for job, entry in of_arm(results, variant, arm).items()}
