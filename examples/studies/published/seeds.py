"""What several seeds say: mean and 95 % t-interval, and the file that keeps every seed's figures."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

RESULTS = Path(__file__).parents[3] / "docs" / "results" / "published"


def interval(values: Sequence[float]) -> str:
    """Mean and half-width of its 95 % t-interval over seeds; no width for one seed."""
    x = torch.tensor(values, dtype=torch.float64)
    if len(x) == 1:
        return f"{x.item():.3f} (one seed)"
    half = student.ppf(0.975, len(x) - 1) * x.std().item() / math.sqrt(len(x))
    return f"{x.mean().item():.3f} ±{half:.3f}"


def write_result(path: Path, header: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> None:
    """JSON: version, the header, and "runs", one line each; floats to five digits."""
    head = json.dumps({"version": 1, **header}, indent=1).removesuffix("\n}")
    lines = [json.dumps({key: _rounded(value) for key, value in run.items()}) for run in runs]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "runs": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n")


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
