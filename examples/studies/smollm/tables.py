"""Runs by arm, and their rates."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from .evaluation import rate
from .store import Job

Results = Mapping[Job, Mapping[str, Any]]


def of_arm(results: Results, variant: str, arm: str) -> dict[Job, Mapping[str, Any]]:
    """Its runs in a variant, in order."""
    return {job: results[job] for job in sorted(results) if (job.variant, job.arm) == (variant, arm)}


def share(entry: Mapping[str, Any], mode: str, kind: str) -> float:
    """A rate of one run."""
    return rate(entry["outcomes"][mode][kind])


def cell(values: Sequence[float]) -> str:
    """Mean, and the range over runs."""
    spread = f" [{min(values):.2f}, {max(values):.2f}]" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{spread}"
