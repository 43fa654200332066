"""Errors of sharded engines against one process, by engine and part: checked, and written to a file if that is asked.

GRADROUTE_SHARDED_FIGURES names the JSON file of which `docs/update_results.py` makes the table in docs/exactness.md.
"""

import json
import os
from pathlib import Path

COLUMNS = ["routed gradient", "directions", "refresh", "filter", "export", "resume"]


def record(engine: str, column: str, error: float, tolerance: float, reference: str = "one process") -> None:
    """Assert that an error is within its tolerance, and note it."""
    assert column in COLUMNS
    assert error <= tolerance, f"{engine}, {column}: {error} > {tolerance}"
    name = os.environ.get("GRADROUTE_SHARDED_FIGURES")
    if name:
        path = Path(name)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        known.setdefault(engine, {})[column] = {"error": error, "tolerance": tolerance, "reference": reference}
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
