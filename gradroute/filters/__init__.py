"""Gradients between backward and the optimizer step: what is hack-ward is measured, taken out, or moved.

`apply_filter` runs a filter by hand once per optimizer step, `attach_filter` has the optimizer run it."""

from gradroute.filters.apply import apply_filter
from gradroute.filters.attached import AttachedFilter, attach_filter
from gradroute.filters.base import FilteredGradients, GradientFilter
from gradroute.filters.projection import ProjectionFilter
from gradroute.filters.rollout import RolloutFilter, RolloutRecord
from gradroute.filters.stats import FilterStats, HackwardShare

__all__ = [
    "AttachedFilter",
    "FilterStats",
    "FilteredGradients",
    "GradientFilter",
    "HackwardShare",
    "ProjectionFilter",
    "RolloutFilter",
    "RolloutRecord",
    "apply_filter",
    "attach_filter",
]
