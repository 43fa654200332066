"""State dicts of gates, refreshers and optimizer handles: everything is checked before anything is changed.

A state is a dict of JSON values and tensors for `torch.save`. It names its format, the settings of the object that it
came from, and the directions that were in force.
"""

from collections.abc import Mapping
from typing import Any

from gradroute.errors import FileFormatError

State = dict[str, Any]


def format_of(owner: object) -> str:
    """The format name of the states of `owner`; the number changes when their content does."""
    return f"gradroute-{type(owner).__name__}-1"


def check_state(owner: object, state: object, expected: Mapping[str, Any]) -> State:
    """`state` as a dict, if it has the keys of `owner.state_dict()`, its format and its settings.

    Args:
        owner: the object that is to take the state.
        state: what its `state_dict()` returned in another run.
        expected: what `owner.state_dict()` returns now.

    Raises:
        FileFormatError: a state of another class or format, other settings, or other directions.
    """
    found = state.get("format") if isinstance(state, Mapping) else type(state).__name__
    if not isinstance(state, Mapping) or found != format_of(owner):
        raise FileFormatError(
            f"`state` should be a state_dict of the format {format_of(owner)}. Found {found!r}. "
            "Fix: load what the same class saved."
        )
    if state.keys() != expected.keys():
        different = sorted(state.keys() ^ expected.keys())
        raise FileFormatError(f"`state` should have the keys {sorted(expected)}. Different: {different}.")
    for part, hint in (
        ("settings", "build the object with the settings it was saved with"),
        ("directions", "load the Directions that were saved along with this state, and build the object on them"),
    ):
        for name in expected.get(part) or {}:
            then, now = (state[part] or {}).get(name), expected[part][name]
            if then != now:
                raise FileFormatError(f"`state` was saved with {name}={then!r}. Found {now!r} here. Fix: {hint}.")
    return dict(state)
