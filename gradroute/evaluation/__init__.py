"""What a trained model does on and ablated, with intervals, and whether a difference was earned.

`evaluate_on_off` measures both views, `compare` gives a verdict against controls, `write_card` writes it down."""

from gradroute.evaluation.card.write import write_card
from gradroute.evaluation.dose import DoseCurve, dose_curve
from gradroute.evaluation.on_off import EvalRecord, OnOffReport, Records, ViewRates, evaluate_on_off
from gradroute.evaluation.plot import plot_training
from gradroute.evaluation.rates import Rate
from gradroute.evaluation.reach import assert_ablation_reaches
from gradroute.evaluation.verdict.arm_runs import ArmRuns, ModeOutcomes
from gradroute.evaluation.verdict.compare import compare, compare_all
from gradroute.evaluation.verdict.control_arms import Controls
from gradroute.evaluation.verdict.criteria import Criteria
from gradroute.evaluation.verdict.verdict import Verdict

__all__ = [
    "ArmRuns",
    "Controls",
    "Criteria",
    "DoseCurve",
    "EvalRecord",
    "ModeOutcomes",
    "OnOffReport",
    "Rate",
    "Records",
    "Verdict",
    "ViewRates",
    "assert_ablation_reaches",
    "compare",
    "compare_all",
    "dose_curve",
    "evaluate_on_off",
    "plot_training",
    "write_card",
]
