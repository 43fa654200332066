"""Put a state in force for a time, and tell which layers ran meanwhile.

Every route and every view does the same: give the layers another state, clear their marks of having run, and at the end
put back the old state and judge by the marks.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

from gradroute.adapters._state import ForwardState
from gradroute.adapters.layer import RoutedLinear
from gradroute.errors import RouteError

Change = Callable[[ForwardState], ForwardState]
Layers = Mapping[str, RoutedLinear]

_ENDED: WeakKeyDictionary[ForwardState, ForwardState] = WeakKeyDictionary()
"""The state of a block that has ended -> the state that was in force before that block."""


def set_states(layers: Layers, change: Change) -> None:
    """Give every layer its changed state; layers that shared a state share the new one.

    Raises:
        RouteError: another thread has set a state that has not ended.
    """
    me = threading.get_ident()
    for name, layer in layers.items():
        if layer.state.thread not in (0, me):
            raise RouteError(
                f"One thread at a time should have a route or ablation open. Found one of another thread at `{name}`, "
                "in the middle of its step. Fix: give each thread a copy of the model, or a lock to share it."
            )
    changed: dict[ForwardState, ForwardState] = {}
    for layer in layers.values():
        if layer.state not in changed:
            changed[layer.state] = change(layer.state)
        _put(layer, "state", changed[layer.state])


@contextmanager
def changed_state(layers: Layers, change: Change) -> Iterator[None]:
    """Change the state of `layers` for the duration of the block.

    Raises `RouteError` at the end if the layers are not in the state that the block gave them: then blocks were left in
    another order than entered. The layers then get the state of the block around that is still open, if there is one.
    """
    before = {name: layer.state for name, layer in layers.items()}
    set_states(layers, change)
    inside = {name: layer.state for name, layer in layers.items()}
    try:
        yield
        moved = [name for name, layer in layers.items() if layer.state is not inside[name]]
        if moved:
            raise RouteError(
                f"The route or ablation of `{moved[0]}` was changed from outside of its block: blocks were left in "
                "another order than entered. Fix: nest `with` blocks, and do not leave one open in a generator."
            )
    finally:
        for name, layer in layers.items():
            _ENDED[inside[name]] = before[name]
            _put(layer, "state", _still_open(before[name]))


def _still_open(state: ForwardState) -> ForwardState:
    # A block may outlive the block around it, as when a generator is closed: its end must not bring that view back.
    while state in _ENDED:
        state = _ENDED[state]
    return state


@contextmanager
def marks_of(layers: Layers, mark: Literal["ran", "ran_under_route"], *, count_outside: bool) -> Iterator[None]:
    """Clear a mark of the layers for the duration of the block, so that it shows at the end which of them ran inside.

    Args:
        layers: the layers to watch.
        mark: "ran" in any forward, or "ran_under_route".
        count_outside: whether a layer that ran inside counts for the block outside too. For a view it does; an inner
            route replaces the mask of the outer one.
    """
    before = {name: getattr(layer, mark) for name, layer in layers.items()}
    try:
        for layer in layers.values():
            _put(layer, mark, False)
        yield
    finally:
        for name, layer in layers.items():
            _put(layer, mark, before[name] or (count_outside and getattr(layer, mark)))


def _put(layer: RoutedLinear, name: str, value: Any) -> None:
    # Not by setattr: nn.Module's looks for parameters and modules first, which takes longer than all the rest here.
    layer.__dict__[name] = value
