"""Keeping directions fresh while the policy moves, or raising.

`Refresher` extracts again every few optimizer steps with the quarantine ablated; `RefreshReport` says what changed."""

from gradroute.refresh.direction_cache import DirectionCache
from gradroute.refresh.refresher import Refresher, RefreshReport

__all__ = [
    "DirectionCache",
    "RefreshReport",
    "Refresher",
]
