"""What to route on: directions from contrastive pairs, and the features of rollouts that are scored along them.

`load_pairs` reads pairs. `extract_activation_directions` and `extract_gradient_directions` make `Directions` of them
with an estimator of `gradroute.directions.estimators`. `capture_activations` and `capture_gradients` read what is
scored. `summary` and `validate` tell how good directions are; `shuffled_pairs` and the like make controls."""

from gradroute.directions.capture import capture_activations, capture_gradients
from gradroute.directions.controls import placebo_pairs, reversed_sign, shuffled_flags, shuffled_pairs
from gradroute.directions.diagnostics import DirectionsSummary, summary
from gradroute.directions.directions import Directions
from gradroute.directions.extract import extract_activation_directions, extract_gradient_directions
from gradroute.directions.features import Capture, Provenance
from gradroute.directions.load import load_pairs
from gradroute.directions.pairs import ContrastivePair
from gradroute.directions.validation import Validation, validate

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
    "placebo_pairs",
    "reversed_sign",
    "shuffled_flags",
    "shuffled_pairs",
    "summary",
    "validate",
]
