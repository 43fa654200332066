"""From labels, scores or features of rollouts to a mask: which rollouts train which block.

A gate is called once per batch and returns a `RouteMask`. It says so when it routes nothing, or everything.
"""

from gradroute.gates.band import BandGate
from gradroute.gates.base import Gate
from gradroute.gates.label import LabelGate
from gradroute.gates.log_ratio import LogRatioGate, ScoreFigures
from gradroute.gates.quantile import QuantileGate
from gradroute.gates.threshold import ThresholdGate

__all__ = [
    "BandGate",
    "Gate",
    "LabelGate",
    "LogRatioGate",
    "QuantileGate",
    "ScoreFigures",
    "ThresholdGate",
]
