"""Gradient routing for reinforcement learning: quarantine what looks like a hack, then ablate the quarantine."""

from importlib.metadata import version

from gradroute.adapters.attach import attach, deployed_parameters, detach, quarantine_parameters
from gradroute.adapters.functional import quarantine_lora
from gradroute.adapters.layer import QuarantineLoRA
from gradroute.adapters.mask import RouteMask
from gradroute.adapters.modes import ablate_quarantine, disable_adapters
from gradroute.adapters.route import clear_route, route, set_route
from gradroute.directions.capture import Capture, capture_activations, capture_gradients
from gradroute.directions.container import Directions
from gradroute.directions.extract import extract_activation_directions, extract_gradient_directions
from gradroute.directions.pairs import ContrastivePair, load_pairs
from gradroute.errors import (
    DeadDirectionError,
    FileFormatError,
    GradRouteError,
    GradRouteWarning,
    RefreshError,
    RouteError,
    TargetError,
)
from gradroute.evaluation import EvalRecord, OnOffReport, Rate, evaluate_on_off
from gradroute.routing.advantages import clean_baseline_advantages
from gradroute.routing.gates import BandGate, LabelGate
from gradroute.routing.refresh import Refresher, RefreshReport

__version__ = version("gradroute")

__all__ = [
    "BandGate",
    "Capture",
    "ContrastivePair",
    "DeadDirectionError",
    "Directions",
    "EvalRecord",
    "FileFormatError",
    "GradRouteError",
    "GradRouteWarning",
    "LabelGate",
    "OnOffReport",
    "QuarantineLoRA",
    "Rate",
    "RefreshError",
    "RefreshReport",
    "Refresher",
    "RouteError",
    "RouteMask",
    "TargetError",
    "ablate_quarantine",
    "attach",
    "capture_activations",
    "capture_gradients",
    "clean_baseline_advantages",
    "clear_route",
    "deployed_parameters",
    "detach",
    "disable_adapters",
    "evaluate_on_off",
    "extract_activation_directions",
    "extract_gradient_directions",
    "load_pairs",
    "quarantine_lora",
    "quarantine_parameters",
    "route",
    "set_route",
]
