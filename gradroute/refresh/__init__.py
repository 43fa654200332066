"""Keeping directions fresh while the policy moves, or raising.

`Refresher` extracts again every few optimizer steps with the quarantine ablated; `RefreshReport` says what changed."""

from gradroute.refresh.refresher import Refresher, RefreshReport
from gradroute.refresh.watch import Watch

__all__ = [
    "RefreshReport",
    "Refresher",
    "Watch",
]
