"""What a trained model does on and ablated, with intervals, and whether a difference was earned.

`evaluate_on_off` measures both views, `dose_curve` the scales between, `assert_ablation_reaches` checks an engine;
`compare` gives a verdict against controls, `write_card` writes everything down."""

from gradroute.evaluation.card import write_card
from gradroute.evaluation.dose import DoseCurve, dose_curve
from gradroute.evaluation.follow import assert_engine_follows
from gradroute.evaluation.on_off import OnOffReport, Records, evaluate_on_off
from gradroute.evaluation.plot import plot_training
from gradroute.evaluation.rates import EvalRecord, Rate, ViewRates
from gradroute.evaluation.reach import assert_ablation_reaches
from gradroute.evaluation.verdict import (
    ArmRuns,
    Controls,
    Criteria,
    ModeOutcomes,
    OneBlock,
    Verdict,
    compare,
    compare_all,
)

__all__ = [
    "ArmRuns",
    "Controls",
    "Criteria",
    "DoseCurve",
    "EvalRecord",
    "ModeOutcomes",
    "OnOffReport",
    "OneBlock",
    "Rate",
    "Records",
    "Verdict",
    "ViewRates",
    "assert_ablation_reaches",
    "assert_engine_follows",
    "compare",
    "compare_all",
    "dose_curve",
    "evaluate_on_off",
    "plot_training",
    "write_card",
]
