"""What to route on: directions from contrastive pairs, and the features of rollouts that are scored along them.

`load_pairs` reads pairs, `extract_activation_directions` and `extract_gradient_directions` make `Directions` of them
with an estimator of `gradroute.directions.estimators`; `capture_activations` and `capture_gradients` read what is
scored."""

from gradroute.directions.capture import Capture, capture_activations, capture_gradients
from gradroute.directions.controls import shuffled_flags
from gradroute.directions.diagnostics import DirectionsSummary, Validation
from gradroute.directions.directions import Directions
from gradroute.directions.extract import extract_activation_directions, extract_gradient_directions
from gradroute.directions.pairs import ContrastivePair, load_pairs
from gradroute.directions.provenance import Provenance

__all__ = [
    "Capture",
    "ContrastivePair",
    "Directions",
    "DirectionsSummary",
    "Provenance",
    "Validation",
    "capture_activations",
    "capture_gradients",
    "extract_activation_directions",
    "extract_gradient_directions",
    "load_pairs",
    "shuffled_flags",
]
