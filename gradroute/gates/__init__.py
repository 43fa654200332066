"""From a score, a label or features to a mask: which rollouts train which block.

Every gate is a `Gate`: called once per batch, it returns a `RouteMask`, and says when it routes nothing or
everything."""

from gradroute.gates.band import BandGate
from gradroute.gates.base import Gate
from gradroute.gates.label import LabelGate
from gradroute.gates.quantile import QuantileGate
from gradroute.gates.threshold import ThresholdGate

__all__ = [
    "BandGate",
    "Gate",
    "LabelGate",
    "QuantileGate",
    "ThresholdGate",
]
