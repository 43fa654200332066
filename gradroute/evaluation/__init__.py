"""On and ablated evaluation, intervals, and verdicts against controls."""

from gradroute.evaluation.ablation_reach import assert_ablation_reaches
from gradroute.evaluation.arm_runs import ArmRuns, ModeOutcomes
from gradroute.evaluation.compare import compare, compare_all
from gradroute.evaluation.controls import Controls
from gradroute.evaluation.criteria import Criteria
from gradroute.evaluation.on_off import EvalRecord, OnOffReport, Records, ViewRates, evaluate_on_off
from gradroute.evaluation.rates import Rate
from gradroute.evaluation.verdict import Verdict

__all__ = [
    "ArmRuns",
    "Controls",
    "Criteria",
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
    "evaluate_on_off",
]
