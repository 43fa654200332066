"""The state a routed layer reads in its forward.

    state = (open route or none) x (ablation scale) x (adapters disabled or not)

States are immutable and carry an id. A context manager gives a layer a new state and later puts the old object back, so
nothing is written into parameters, and an exception restores what was there. A state belongs to the thread that set it.
"""

import re
import threading
import uuid
from dataclasses import dataclass, field
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gradroute.adapters._gates import NO_GATES, Gates, Weights, weights_for, weights_type
from gradroute.adapters.mask import RouteMask
from gradroute.adapters.pending import PendingMask
from gradroute.errors import RouteError


@dataclass(eq=False)
class ActiveRoute:
    """A mask in force.

    Args:
        mask: the user's.
        sticky: set by `set_route`, without a block that ends it.
        closed: whether it has ended.
        forward_only: opened where gradients are off, so that forwards without gradients are what it is for.
    """

    mask: RouteMask | PendingMask
    sticky: bool
    closed: bool = False
    forward_only: bool = field(default_factory=lambda: not torch.is_grad_enabled())
    m: Tensor = field(init=False, repr=False)
    parameter_gates: tuple[Tensor, Tensor] | None = field(init=False, repr=False, default=None)
    is_binary: bool = field(init=False, repr=False)
    is_on: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Copies of one type, whatever the mask was made of: a compiled forward is compiled for the type.
        self.m = _wide(self.mask.m)
        if isinstance(self.mask, PendingMask):
            self.mask.open()
        else:
            self.parameter_gates = _wide(self.mask.g_d), _wide(self.mask.g_q)
        self.is_binary, self.is_on = self.mask.is_binary, bool((self.m == 1).all())

    @property
    def is_per_row(self) -> bool:
        """Whether one weight serves all tokens of a row."""
        return self.m.ndim == 1

    def gates(self, x: Tensor, layer: str, m: Weights | None, binary: bool) -> Gates:
        """All three gates for an input, of which `m` is given."""
        if self.parameter_gates is not None:
            g_d, g_q = (weights_for(gate, x, layer, "mask") for gate in self.parameter_gates)
            return Gates(m, g_d, g_q, binary=binary and self.is_binary)
        if torch.compiler.is_compiling():
            raise RouteError(
                f"A mask that is decided after the forward needs an eager one. Found `{layer}` inside torch.compile. "
                "Fix: decide before the forward, or leave the model uncompiled."
            )
        # An input of the same axes, type and device, that holds nothing.
        like = x.detach().new_empty(()).expand(x.shape)
        return Gates(m, binary=binary and self.is_binary, decided=cache(lambda: self._decided(like, layer, m, binary)))

    def _decided(self, like: Tensor, layer: str, m: Weights | None, binary: bool) -> Gates:
        assert isinstance(self.mask, PendingMask)
        mask = self.mask.decided
        g_d, g_q = (weights_for(_wide(gate), like, layer, "mask") for gate in (mask.g_d, mask.g_q))
        return Gates(m, g_d, g_q, binary=binary and mask.is_binary)


def _wide(weights: Tensor) -> Tensor:
    return weights.to(torch.float32 if weights.device.type == "mps" else torch.float64)


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
        object.__setattr__(self, "ablates_what_trains", _ablates_what_trains(self.route, self.scale))

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
        if self.route is None and isinstance(self.scale, float):
            return
        if x.ndim == 2 and is_expert(layer):
            raise RouteError(
                f"`{layer}` is an expert: it gets the tokens that were sent to it, {tuple(x.shape)} here, and which "
                "rows they come from is not known. Fix: exclude the experts from `target_modules`."
            )
        per_row = (self.route is None or self.route.is_per_row) and (
            isinstance(self.scale, float) or self.scale.ndim == 1
        )
        if per_row and x.ndim >= 3:
            axes = 3
        elif per_row and x.ndim == 2 and not _ONE_OF_SEVERAL.search(layer):
            return
        else:
            axes = x.ndim
        self._layer_of_axes.setdefault(axes, layer)
        if len(self._layer_of_axes) > 1:
            found = ", ".join(
                f"{axes} axes in `{name}`" for axes, name in sorted(self._layer_of_axes.items(), reverse=True)
            )
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


def combine_scales(first: float | Tensor, second: float | Tensor) -> float | Tensor:
    """The product of two ablation scales; a per-row one is aligned with a per-token one on the left."""
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return first * second
    aligned = _aligned(first, second)
    if aligned is None:
        found = (tuple(first.shape), tuple(second.shape))
        raise RouteError(f"Nested ablations should have `rows` of one batch. Found the shapes {found}.")
    return aligned[0] * aligned[1]


def _aligned(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both with as many axes, a value per row in front of a value per token; None if they are not of one batch."""
    low, high = sorted((first, second), key=lambda t: t.ndim)
    if low.shape != high.shape[: low.ndim]:
        return None
    low = low.reshape(low.shape + (1,) * (high.ndim - low.ndim)).to(high.device)
    return low, high


def _ablates_what_trains(route: ActiveRoute | None, scale: float | Tensor) -> bool:
    if route is None or (isinstance(scale, float) and scale != 0.0):
        return False
    # Of rows that are not decided yet, any that uses the quarantine may come to train it.
    trains = route.m != 0 if route.parameter_gates is None else (route.m != 0) & (route.parameter_gates[1] != 0)
    if not isinstance(scale, Tensor):
        return bool(trains.any())
    aligned = _aligned(trains, scale == 0)
    # Rows of another batch are refused by the first forward.
    return aligned is not None and bool((aligned[0] & aligned[1]).any())


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
