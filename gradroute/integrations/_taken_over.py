"""Directions of a checkpoint, put into the object that gates, filters and a refresher of this run hold."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gradroute.directions.directions import Directions
from gradroute.errors import FileFormatError


def take_over(directions: Directions, saved: Directions, folder: Path, holders: Iterable[Any]) -> None:
    """`directions` <- `saved`, on the device that they are on.

    Args:
        directions: of this run.
        saved: of the checkpoint.
        folder: that they were saved in.
        holders: gates and filters of this run.

    Raises:
        FileFormatError: directions of other pairs, another feature or another control.
    """
    expected, found = directions.provenance, saved.provenance
    if any(getattr(expected, name) != getattr(found, name) for name in ("pair_hash", "feature", "control")):
        raise FileFormatError(
            f"The directions in {folder} should be of the same pairs, feature and control as `directions`. Found "
            f"{saved!r} instead of {directions!r}."
        )
    device = next(iter(directions.hack.values())).device
    for name in ("rows", "hack", "clean", "centre", "scale"):
        group = getattr(saved, name)
        setattr(directions, name, None if group is None else {key: value.to(device) for key, value in group.items()})
    for name in ("provenance", "version", "step", "heldout"):
        setattr(directions, name, getattr(saved, name))
    for holder in holders:
        # A gate or filter caches what it read from the directions, by version: this version now has other values.
        if hasattr(holder, "_version"):
            holder._version = None
