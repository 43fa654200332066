"""Whether a drop was earned: a verdict on a treatment, from runs of it and of its controls.

`ArmRuns` holds what the models of one arm did, `Controls` what a treatment is compared with, `Criteria` the margins;
`compare` and `compare_all` return a `Verdict`, and in it `OneBlock` where there are arms with one block."""

from gradroute.evaluation.verdict.arms import ArmRuns, Controls, ModeOutcomes
from gradroute.evaluation.verdict.compare import compare, compare_all
from gradroute.evaluation.verdict.criteria import Criteria
from gradroute.evaluation.verdict.one_block import OneBlock
from gradroute.evaluation.verdict.verdict import Verdict

__all__ = ["ArmRuns", "Controls", "Criteria", "ModeOutcomes", "OneBlock", "Verdict", "compare", "compare_all"]
