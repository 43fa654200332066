"""A result file: {version, job, recipe, entry} in JSON, written whole or not at all, and read with suspicion."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ResultError(Exception):
    """A result file that cannot be counted; says which file and which field."""


def write_file(
    path: Path, version: int, job: Mapping[str, Any], recipe: Mapping[str, Any], entry: Mapping[str, Any]
) -> None:
    """A reader sees the whole file or none: it is renamed when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    result = {"version": version, "job": job, "recipe": recipe, "entry": entry}
    partial.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    partial.replace(path)


def read_entry(
    path: Path, version: int, job: Mapping[str, Any], recipe: Mapping[str, Any], fields: Sequence[str]
) -> dict[str, Any]:
    """The entry of a result file, which holds `fields`.

    Raises:
        ResultError: not JSON, of another version, another job or another recipe, or with fields missing.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ResultError(f"{path}: cannot be read as JSON ({error}). Fix: delete it, and it is run again.") from error
    if not isinstance(result, dict):
        raise ResultError(f"{path}: should hold an object. Found {type(result).__name__}.")
    # As JSON has it: tuples become lists.
    expected = json.loads(json.dumps({"version": version, "job": dict(job), "recipe": dict(recipe)}))
    wanted, found = _flat(expected), _flat({field: result.get(field) for field in expected})
    for field in sorted(wanted.keys() | found.keys()):
        if wanted.get(field) != found.get(field):
            raise ResultError(
                f"{path}: `{field}` should be {wanted.get(field)!r}. Found {found.get(field)!r}. "
                "Fix: another --out, or delete the file, and it is run again."
            )
    entry = result.get("entry")
    for field in fields:
        if not isinstance(entry, dict) or field not in entry:
            raise ResultError(f"{path}: `entry.{field}` is missing. Fix: delete the file, and it is run again.")
    return dict(entry)


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """{"job": {"arm": x}} -> {"job.arm": x}."""
    flat = {}
    for name, value in fields.items():
        flat |= {f"{name}.{each}": value[each] for each in value} if isinstance(value, dict) else {name: value}
    return flat
