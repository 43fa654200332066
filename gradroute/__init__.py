"""Gradient routing for reinforcement learning: quarantine what looks like a hack, then ablate the quarantine."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from gradroute import adapters as adapters
from gradroute import advantages as advantages
from gradroute import directions as directions
from gradroute import errors as errors
from gradroute import evaluation as evaluation
from gradroute import filters as filters
from gradroute import gates as gates
from gradroute import optim as optim
from gradroute import refresh as refresh
from gradroute import schemes as schemes
from gradroute.adapters import (
    QuarantineLoRA,
    RouteMask,
    ablate_quarantine,
    attach,
    check_model,
    deployed_parameters,
    detach,
    disable_adapters,
    merge_deployed,
    parameter_summary,
    quarantine_parameters,
    route,
)
from gradroute.advantages import clean_baseline_advantages
from gradroute.directions import (
    ContrastivePair,
    Directions,
    capture_activations,
    capture_gradients,
    extract_activation_directions,
    extract_gradient_directions,
    load_pairs,
)
from gradroute.errors import GradRouteError, GradRouteWarning
from gradroute.evaluation import EvalRecord, compare, evaluate_on_off, write_card
from gradroute.filters import ProjectionFilter, RolloutFilter, apply_filter, attach_filter
from gradroute.gates import BandGate, LabelGate, LogRatioGate, QuantileGate, ThresholdGate
from gradroute.optim import audit_updates, skip_idle_blocks
from gradroute.refresh import Refresher

if TYPE_CHECKING:
    from gradroute.adapters import QuarantineLoraConfig, export_deployed, export_full, load_quarantined

__version__ = version("gradroute")

_LAZY = {"QuarantineLoraConfig", "export_deployed", "export_full", "load_quarantined"}
"""peft takes seconds to import, and not everybody needs it."""

_ELSEWHERE = {
    "gradroute.errors": {"DeadDirectionError", "FileFormatError", "RefreshError", "RouteError", "TargetError"},
    "gradroute.adapters": {
        "Finding",
        "ParameterSummary",
        "SvdGain",
        "clear_route",
        "init",
        "quarantine_lora",
        "set_route",
    },
    "gradroute.directions": {"Capture", "DirectionsSummary", "Validation", "shuffled_flags"},
    "gradroute.directions.estimators": {"Estimator", "MeanDifference", "Ridge", "Svd", "TStatistic"},
    "gradroute.refresh": {"RefreshReport"},
    "gradroute.filters": {"FilterStats"},
    "gradroute.optim": {"UpdateAudit", "decay_toward_start", "project_updates", "purge_moments"},
    "gradroute.schemes": {"detach_mix_mask", "expand_route_ablate_mask", "graft_mask", "sgtm_mask"},
    "gradroute.evaluation": {
        "ArmRuns",
        "Controls",
        "Criteria",
        "DoseCurve",
        "ModeOutcomes",
        "OnOffReport",
        "Rate",
        "Verdict",
        "assert_ablation_reaches",
        "compare_all",
        "dose_curve",
        "plot_training",
    },
}
"""What was at the top level in 0.1.0, by where it lives now."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(adapters, name)
    for module, names in _ELSEWHERE.items():
        if name in names:
            raise AttributeError(f"`gradroute.{name}` moved. Fix: use {module}.{name}.")
    raise AttributeError(f"module 'gradroute' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "BandGate",
    "ContrastivePair",
    "Directions",
    "EvalRecord",
    "GradRouteError",
    "GradRouteWarning",
    "LabelGate",
    "LogRatioGate",
    "ProjectionFilter",
    "QuantileGate",
    "QuarantineLoRA",
    "QuarantineLoraConfig",
    "Refresher",
    "RolloutFilter",
    "RouteMask",
    "ThresholdGate",
    "ablate_quarantine",
    "apply_filter",
    "attach",
    "attach_filter",
    "audit_updates",
    "capture_activations",
    "capture_gradients",
    "check_model",
    "clean_baseline_advantages",
    "compare",
    "deployed_parameters",
    "detach",
    "disable_adapters",
    "evaluate_on_off",
    "export_deployed",
    "export_full",
    "extract_activation_directions",
    "extract_gradient_directions",
    "load_pairs",
    "load_quarantined",
    "merge_deployed",
    "parameter_summary",
    "quarantine_parameters",
    "route",
    "skip_idle_blocks",
    "write_card",
]
