"""The comparison of `reporting.score_view` on SmolLM2: markers of a kind taken together."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from reporting.score_view import Measures, paired_table

from .environment import MARKERS, MONITORED
from .evaluation import NO_NOTE
from .tables import Results, of_arm, share

KINDS = {"monitored": MONITORED, "held out": tuple(marker for marker in MARKERS if marker not in MONITORED)}
FLAGGED = {"recall, monitored": "monitored", "recall, held out": "held_out", "false positives": "clean"}


def measures(entry: Mapping[str, Any]) -> Measures:
    """Its gate over all of training, and both views of the trained model."""
    found: dict[str, float | None] = {}
    for kind in KINDS:
        areas = [point[name] for point in entry["curve"] if (name := f"auroc_{kind.replace(' ', '_')}") in point]
        found[f"gate: AUROC, {kind}"] = fmean(areas) if areas else None
    for title, name in FLAGGED.items():
        hits, rows = (sum(point[f"flagged_{name}"][i] for point in entry["curve"]) for i in (0, 1))
        found[f"gate: {title}"] = hits / rows if rows else None
    for view in ("ablated", "on"):
        for kind, markers in KINDS.items():
            found[f"{view}: hack, {kind}"] = fmean(share(entry, marker, f"hack_{view}") for marker in markers)
        found[f"{view}: solve, no note"] = share(entry, NO_NOTE, f"solve_{view}")
    return found


def score_view_table(ablated: Results, sampled: Results, variant: str, arm: str) -> str:
    """One row per measure, of the runs of `arm` that both reports have."""
    pair = [{job: measures(entry) for job, entry in of_arm(each, variant, arm).items()} for each in (ablated, sampled)]
    return paired_table(*pair)
