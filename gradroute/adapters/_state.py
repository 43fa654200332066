"""The state a routed layer reads in its forward, and how it is put in force for a time.

    state = (open route or none) x (ablation scale) x (adapters disabled or not)

States are immutable and carry an id. A context manager gives a layer a new state and later puts the old object back, so
nothing is written into parameters, and an exception restores what was there. A state belongs to the thread that set it.

Every route and every view does the same: give the layers another state, clear their marks of having run, and at the end
put back the old state and judge by the marks.
"""

import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradroute._protocol import RoutedLayer
from gradroute.adapters._gates import NO_GATES, ActiveRoute, Gates, weights_for, weights_type
from gradroute.errors import RouteError


def _new_id() -> Tensor:
    # Saved by autograd later, so neither an inference tensor nor on a device that happens to be the default now.
    with torch.inference_mode(False):
        return torch.tensor(uuid.uuid4().int >> 65, device="cpu")


def _other_threads() -> frozenset[int]:
    numbers = {thread.ident for thread in threading.enumerate() if thread.ident is not None}
    return frozenset(numbers - {threading.get_ident()})


@dataclass(frozen=True, eq=False)
class ForwardState:
    """Everything that a routed layer's forward depends on, except for its input and parameters.

    Args:
        route: the mask in force.
        scale: of the quarantine.
        disabled: both blocks are off.
        thread: that set it; 0 for the state that nobody set.
        older_threads: the others that ran when it was set.
        ablates_what_trains: a row that is to train the quarantine is ablated.
    """

    route: ActiveRoute | None = None
    scale: float | Float[Tensor, "..."] = 1.0
    disabled: bool = False
    thread: int = field(default_factory=threading.get_ident)
    older_threads: frozenset[int] = field(default_factory=_other_threads)
    ablates_what_trains: bool = field(init=False, default=False)
    id: Int[Tensor, ""] = field(default_factory=_new_id)
    _cache: dict[tuple[torch.Size, torch.device, torch.dtype], Gates] = field(default_factory=dict, repr=False)
    _layer_of_axes: dict[int, str] = field(default_factory=dict, repr=False)
    _checked: set[str] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        ablates = self.route is not None and self.route.trains_ablated_rows(self.scale)
        object.__setattr__(self, "ablates_what_trains", ablates)

    @property
    def quarantine_is_off(self) -> bool:
        """Whether the quarantine is ablated for every row."""
        return isinstance(self.scale, float) and self.scale == 0.0

    @property
    def view(self) -> str:
        """The view that a forward shows: "on", "ablated", "scaled 0.5", "scaled by rows" or "disabled"."""
        if self.disabled:
            return "disabled"
        if self.quarantine_is_off:
            return "ablated"
        if not isinstance(self.scale, float):
            return "scaled by rows"
        return "on" if self.scale == 1.0 else f"scaled {self.scale!r}"

    def gates(self, x: Float[Tensor, "*batch d_in"], layer: str) -> Gates:
        """The three gates, one float per leading index of `x`."""
        if self.route is None and isinstance(self.scale, float) and self.scale == 1.0:
            return NO_GATES
        if torch.compiler.is_compiling():
            return self._spread(x, layer)
        key = (x.shape[:-1], x.device, x.dtype)
        # (tokens, d) of one layer says nothing about another layer with as many.
        if key not in self._cache or (x.ndim == 2 and layer not in self._checked):
            self._check_axes(x, layer)
            self._checked.add(layer)
        if key not in self._cache:
            # Few shapes occur under one state; a long generation under a sticky state must not grow the cache.
            if len(self._cache) >= 16:
                self._cache.clear()
            self._cache[key] = self._spread(x, layer)
        return self._cache[key]

    def _check_axes(self, x: Tensor, layer: str) -> None:
        """Rows must mean the same in every layer: an expert's input (tokens, d) may by chance have `batch` tokens.

        With one weight per row, inputs of three axes and more have the batch in front. (batch, d) beside them is a
        pooled row, as in a classifier's head, unless the layer is one of several: those may share out the tokens.
        """
        weights = [w for w in (self.route and self.route.m, self.scale) if isinstance(w, Tensor)]
        if not weights:
            return
        if x.ndim == 2 and is_expert(layer):
            raise RouteError(
                f"`{layer}` is an expert: it gets the tokens that were sent to it, {tuple(x.shape)} here, and which "
                "rows they come from is not known. Fix: exclude the experts from `target_modules`."
            )
        per_row = all(w.ndim == 1 for w in weights)
        if per_row and x.ndim == 2 and not _ONE_OF_SEVERAL.search(layer):
            return
        self._layer_of_axes.setdefault(min(x.ndim, 3) if per_row else x.ndim, layer)
        if len(self._layer_of_axes) > 1:
            several = sorted(self._layer_of_axes.items(), reverse=True)
            found = ", ".join(f"{axes} axes in `{name}`" for axes, name in several)
            raise RouteError(
                f"The inputs of all layers under one mask should have the same axes. Found {found}: a module that "
                "flattens its tokens, or takes some of them (an expert), cannot be matched with rows. "
                "Fix: exclude it from `target_modules`, or run it under a route for it alone."
            )

    def _spread(self, x: Float[Tensor, "*batch d_in"], layer: str) -> Gates:
        route = self.route
        # A compiled forward is not to depend on a mask's values.
        eager = not torch.compiler.is_compiling()
        m = None if route is None else weights_for(route.m, x, layer, "mask")
        if route is not None and route.is_on and eager:
            m = None
        if isinstance(self.scale, Tensor):
            scale = weights_for(self.scale, x, layer, "ablation rows")
            m = scale if m is None else m * scale
        elif self.scale != 1.0:
            scale = torch.full(x.shape[:-1], self.scale, dtype=weights_type(x), device=x.device)
            m = scale if m is None else m * scale
        simple = eager and isinstance(self.scale, float) and self.scale in (0.0, 1.0)
        return Gates(m, binary=simple) if route is None else route.gates(x, layer, m, simple)


_ONE_OF_SEVERAL = re.compile(r"(^|\.)\d+(\.|$)")


def is_expert(layer: str) -> bool:
    """Whether a layer's name says that it is an expert, which gets those tokens that a router sends to it."""
    return re.search(r"(^|\.)experts\.", layer) is not None


def check_thread(state: ForwardState, layer: str) -> None:
    """Raise if `state` was set by another thread and is not meant for this one.

    A thread that was started inside the block (an engine, data parallelism) may use the state, unless it trains.
    """
    me = threading.get_ident()
    if state.thread in (0, me) or (me not in state.older_threads and not torch.is_grad_enabled()):
        return
    raise RouteError(
        f"`{layer}` should run in the thread that opened its route or ablation. Found another thread. "
        "Fix: give each thread a copy of the model, or a lock to share it."
    )


INITIAL = ForwardState(thread=0, older_threads=frozenset())
"""No route, nothing ablated: the state of every layer outside of `with` blocks. Shared, since states are immutable."""


class StatefulLayer(RoutedLayer):
    """A routed layer whose forward reads a state, and leaves marks that it ran."""

    # On the class, so that a layer somebody else built (PEFT's) needs no second constructor.
    name: str = ""
    state: ForwardState = INITIAL
    # Marks that the blocks in force clear when they open and read when they close.
    ran: bool = False
    ran_under_route: bool = False
    bottlenecks: list[Tensor] | None = None
    """Given a list, forwards without gradients append to it, per token, A_d x in the first r columns."""

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside a `with` block would stay routed or ablated for ever: no block would end it.
        temporary = ("state", "ran", "ran_under_route", "bottlenecks")
        return {name: value for name, value in self.__dict__.items() if name not in temporary}

    @property
    def has_open_route(self) -> bool:
        return self.state.route is not None

    @property
    def view(self) -> str:
        return self.state.view


Change = Callable[[ForwardState], ForwardState]
Layers = Mapping[str, StatefulLayer]

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
    changed = cache(change)
    for layer in layers.values():
        _put(layer, "state", changed(layer.state))


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
            state = _ENDED[inside[name]] = before[name]
            # A block may outlive the block around it, as when a generator is closed: its end must not bring that back.
            while state in _ENDED:
                state = _ENDED[state]
            _put(layer, "state", state)


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


def _put(layer: StatefulLayer, name: str, value: Any) -> None:
    # Not by setattr: nn.Module's looks for parameters and modules first, which takes longer than all the rest here.
    layer.__dict__[name] = value
