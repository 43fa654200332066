"""The tables of `docs/directions-study.md`, from the file that `directions_study.py` wrote."""

import json
from pathlib import Path
from typing import Any

ESTIMATORS = ("mean difference", "standardised", "t-statistic", "first SVD axis", "ridge")
Row = list[str]


def read_study(path: Path) -> dict[str, Any]:
    """What `directions_study.py` wrote."""
    study: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return study


def left_out_table(study: dict[str, Any], left_out: str) -> tuple[Row, list[Row]]:
    """AUROC by feature and estimator, beside its controls; bold where it is above every random direction."""
    cells = {(c["feature"], c["direction"]): c for c in study["cells"] if c["left_out"] == left_out}
    rows = []
    for feature in dict.fromkeys(feature for feature, _ in cells):
        random = cells[feature, "random"]
        draws = sorted(random["draws"])
        row = [feature]
        for name in ESTIMATORS:
            cell = cells[feature, name]
            value = f"{cell['auroc']:.2f}"
            row.append(
                f"{f'**{value}**' if cell['auroc'] > draws[-1] else value} [{cell['low']:.2f}, {cell['high']:.2f}]"
            )
        row.append(f"{random['auroc']:.2f}, {draws[0]:.2f} to {draws[-1]:.2f}")
        row.append(f"{cells[feature, 'shuffled labels']['auroc']:.2f}")
        rows.append(row)
    return ["feature", *ESTIMATORS, "random: mean, range", "shuffled labels"], rows


def transfer_table(study: dict[str, Any]) -> tuple[Row, list[Row]]:
    """AUROC of a category's direction (rows) on another's pairs (columns)."""
    between = study["transfer"]
    rows = [
        [source.replace("_", " "), *("" if target == source else f"{value:.2f}" for target, value in targets.items())]
        for source, targets in between.items()
    ]
    return ["from \\ on", *(name.replace("_", " ") for name in between)], rows
