"""Gradient routing for reinforcement learning: quarantine what looks like a hack, then ablate the quarantine."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from gradroute.adapters import init
from gradroute.adapters.attach import attach, deployed_parameters, detach, quarantine_parameters
from gradroute.adapters.check import Finding, ParameterSummary, check_model, parameter_summary
from gradroute.adapters.functional import quarantine_lora
from gradroute.adapters.layer import QuarantineLoRA
from gradroute.adapters.mask import RouteMask
from gradroute.adapters.merge import merge_deployed
from gradroute.adapters.modes import ablate_quarantine, disable_adapters
from gradroute.adapters.route import clear_route, route, set_route
from gradroute.adapters.svd_gain import SvdGain
from gradroute.directions.capture import Capture, capture_activations, capture_gradients
from gradroute.directions.container import Directions
from gradroute.directions.controls import shuffled_flags
from gradroute.directions.diagnostics import DirectionsSummary, Validation
from gradroute.directions.estimator import Estimator
from gradroute.directions.estimators import MeanDifference, Svd, TStatistic
from gradroute.directions.extract import extract_activation_directions, extract_gradient_directions
from gradroute.directions.pairs import ContrastivePair, load_pairs
from gradroute.directions.ridge import Ridge
from gradroute.errors import (
    DeadDirectionError,
    FileFormatError,
    GradRouteError,
    GradRouteWarning,
    RefreshError,
    RouteError,
    TargetError,
)
from gradroute.evaluation import (
    ArmRuns,
    Controls,
    Criteria,
    EvalRecord,
    ModeOutcomes,
    OnOffReport,
    Rate,
    Verdict,
    assert_ablation_reaches,
    compare,
    compare_all,
    evaluate_on_off,
)
from gradroute.evaluation.card import write_card
from gradroute.evaluation.dose import DoseCurve, dose_curve
from gradroute.evaluation.plotting import plot_training
from gradroute.routing.advantages import clean_baseline_advantages
from gradroute.routing.apply_filter import apply_filter
from gradroute.routing.attach_filter import attach_filter
from gradroute.routing.audit import UpdateAudit, audit_updates
from gradroute.routing.direction_cache import DirectionCache
from gradroute.routing.filter_stats import FilterStats
from gradroute.routing.filters import ProjectionFilter
from gradroute.routing.gates import BandGate, LabelGate, ThresholdGate
from gradroute.routing.idle_blocks import skip_idle_blocks
from gradroute.routing.optim import decay_toward_start, project_updates, purge_moments
from gradroute.routing.quantile_gate import QuantileGate
from gradroute.routing.refresh import Refresher, RefreshReport
from gradroute.routing.rollout_filter import RolloutFilter
from gradroute.routing.schemes import detach_mix_mask, expand_route_ablate_mask, graft_mask, sgtm_mask

if TYPE_CHECKING:
    from gradroute.adapters.peft.checkpoint import load_quarantined
    from gradroute.adapters.peft.config import QuarantineLoraConfig
    from gradroute.adapters.peft.export import export_deployed, export_full

__version__ = version("gradroute")

_LAZY = {
    "QuarantineLoraConfig": "gradroute.adapters.peft.config",
    "export_deployed": "gradroute.adapters.peft.export",
    "export_full": "gradroute.adapters.peft.export",
    "load_quarantined": "gradroute.adapters.peft.checkpoint",
}


def __getattr__(name: str) -> Any:
    # peft takes seconds to import, and not everybody needs it.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gradroute' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "ArmRuns",
    "BandGate",
    "Capture",
    "ContrastivePair",
    "Controls",
    "Criteria",
    "DeadDirectionError",
    "DirectionCache",
    "Directions",
    "DirectionsSummary",
    "DoseCurve",
    "Estimator",
    "EvalRecord",
    "FileFormatError",
    "FilterStats",
    "Finding",
    "GradRouteError",
    "GradRouteWarning",
    "LabelGate",
    "MeanDifference",
    "ModeOutcomes",
    "OnOffReport",
    "ParameterSummary",
    "ProjectionFilter",
    "QuantileGate",
    "QuarantineLoRA",
    "QuarantineLoraConfig",
    "Rate",
    "RefreshError",
    "RefreshReport",
    "Refresher",
    "Ridge",
    "RolloutFilter",
    "RouteError",
    "RouteMask",
    "Svd",
    "SvdGain",
    "TStatistic",
    "TargetError",
    "ThresholdGate",
    "UpdateAudit",
    "Validation",
    "Verdict",
    "ablate_quarantine",
    "apply_filter",
    "assert_ablation_reaches",
    "attach",
    "attach_filter",
    "audit_updates",
    "capture_activations",
    "capture_gradients",
    "check_model",
    "clean_baseline_advantages",
    "clear_route",
    "compare",
    "compare_all",
    "decay_toward_start",
    "deployed_parameters",
    "detach",
    "detach_mix_mask",
    "disable_adapters",
    "dose_curve",
    "evaluate_on_off",
    "expand_route_ablate_mask",
    "export_deployed",
    "export_full",
    "extract_activation_directions",
    "extract_gradient_directions",
    "graft_mask",
    "init",
    "load_pairs",
    "load_quarantined",
    "merge_deployed",
    "parameter_summary",
    "plot_training",
    "project_updates",
    "purge_moments",
    "quarantine_lora",
    "quarantine_parameters",
    "route",
    "set_route",
    "sgtm_mask",
    "shuffled_flags",
    "skip_idle_blocks",
    "write_card",
]
