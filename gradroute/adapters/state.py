"""The state a routed layer reads in its forward, and the record that ties a backward to it.

    state = (open route or none) x (ablation scale) x (adapters disabled or not)

States are immutable and carry an id. A context manager gives a layer a new state and later puts the old object back, so
nothing is written into parameters and an exception restores what was there.

Gradient checkpointing runs a layer's forward a second time, inside backward. If the state has changed by then the
gradients are wrong and nothing shows it; `ForwardRecord` finds this out and raises.
"""

import sys
import uuid
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from gradroute.adapters.mask import RouteMask
from gradroute.errors import RouteError

Weights = Float[Tensor, "*batch"]


@dataclass(eq=False)
class ActiveRoute:
    """A mask in force, and the layers (by `id`) that ran under it."""

    mask: RouteMask
    sticky: bool
    ran: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Gates:
    """m, g_d and g_q of one forward, a float per leading index of its input; None means 1 everywhere."""

    m: Weights | None = None
    g_d: Weights | None = None
    g_q: Weights | None = None


def _new_id() -> Tensor:
    # Saved by autograd later, so neither an inference tensor nor on a device that happens to be the default now.
    with torch.inference_mode(False):
        return torch.tensor(uuid.uuid4().int >> 65, device="cpu")


@dataclass(frozen=True, eq=False)
class ForwardState:
    """What a routed layer's forward depends on besides its input and parameters."""

    route: ActiveRoute | None = None
    scale: float | Float[Tensor, "..."] = 1.0
    disabled: bool = False
    id: Int[Tensor, ""] = field(default_factory=_new_id)
    _cache: dict[tuple[torch.Size, torch.device, torch.dtype], Gates] = field(default_factory=dict, repr=False)

    @property
    def quarantine_is_off(self) -> bool:
        """Whether the quarantine is ablated for every row."""
        return isinstance(self.scale, float) and self.scale == 0.0

    def gates(self, x: Float[Tensor, "*batch d_in"], layer: str) -> Gates:
        """The three gates, one float per leading index of `x`."""
        key = (x.shape[:-1], x.device, x.dtype)
        if key not in self._cache:
            # Few shapes occur under one state; a long generation under a sticky state must not grow the cache.
            if len(self._cache) >= 16:
                self._cache.clear()
            self._cache[key] = self._spread(x, layer)
        return self._cache[key]

    def _spread(self, x: Float[Tensor, "*batch d_in"], layer: str) -> Gates:
        mask = None if self.route is None else self.route.mask
        m = None if mask is None else _per_row(mask.m, x, layer, "mask")
        if isinstance(self.scale, Tensor):
            scale = _per_row(self.scale, x, layer, "ablation rows")
            m = scale if m is None else m * scale
        elif self.scale != 1.0:
            # float32 at least: a scale of 0.3 rounded to bf16 would be off by 0.2 %.
            dtype = torch.promote_types(x.dtype, torch.float32)
            scale = torch.full(x.shape[:-1], self.scale, dtype=dtype, device=x.device)
            m = scale if m is None else m * scale
        if mask is None:
            return Gates(m)
        return Gates(m, _per_row(mask.g_d, x, layer, "mask"), _per_row(mask.g_q, x, layer, "mask"))


def combine_scales(first: float | Tensor, second: float | Tensor) -> float | Tensor:
    """The product of two ablation scales; a per-row one is aligned with a per-token one on the left."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        low, high = sorted((first, second), key=lambda t: t.ndim)
        if low.shape != high.shape[: low.ndim]:
            found = (tuple(first.shape), tuple(second.shape))
            raise RouteError(f"Nested ablations should have `rows` of one batch. Found the shapes {found}.")
        return low.reshape(low.shape + (1,) * (high.ndim - low.ndim)) * high
    return first * second


def _per_row(values: Tensor, x: Tensor, layer: str, what: str) -> Weights:
    lead = x.shape[:-1]
    if values.shape != lead[: values.ndim]:
        found = tuple(values.shape)
        hint = "give a mask with one row per sequence of this batch: (batch,) or (batch, seq)"
        if len(found) == 1 and lead.numel() == found[0]:
            hint = f"packed inputs take a mask of shape {tuple(lead)}"
        elif len(found) == 2 and len(lead) == 1:
            hint = "this module flattens its tokens; exclude it from `target_modules`"
        raise RouteError(
            f"The {what} of shape {found} should match the leading axes {tuple(lead)} of the input of `{layer}`. "
            f"Fix: {hint}."
        )
    values = values.to(x.device)
    return (
        values.reshape(values.shape + (1,) * (len(lead) - values.ndim))
        .expand(lead)
        .clone(memory_format=torch.contiguous_format)
    )


@dataclass(frozen=True)
class ForwardRecord:
    """Which state one forward of one layer ran in, and whether it ran inside backward.

    Raises on creation if a reentrant checkpoint recomputes the layer in another state than it first ran in.
    """

    layer: str
    key: int
    state: ForwardState
    unverified: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        recomputing = torch._C._current_graph_task_id() != -1
        if recomputing or not torch.is_grad_enabled():
            checkpoint = _reentrant_checkpoint()
            if checkpoint is not None:
                self._compare_with_first_forward(checkpoint, recomputing)
            # Under non-reentrant checkpointing this forward's own graph is thrown away and `check_backward` decides.
            object.__setattr__(self, "unverified", recomputing and checkpoint is None)
        if not recomputing and self.state.route is not None:
            self.state.route.ran.add(self.key)

    def _compare_with_first_forward(self, checkpoint: Any, recomputing: bool) -> None:
        """A reentrant checkpoint's context is the same object in forward and backward: the states are kept on it."""
        first_states = checkpoint.__dict__.setdefault("gradroute_states", set())
        if not recomputing:
            first_states.add((self.key, self.state.id.item()))
        elif (self.key, self.state.id.item()) not in first_states:
            raise RouteError(_CHANGED.format(layer=self.layer))

    @property
    def state_id(self) -> Int[Tensor, ""]:
        """Saved with the activations: under non-reentrant checkpointing it comes back from the recomputation."""
        return self.state.id

    def check_backward(self, saved_id: Int[Tensor, ""]) -> None:
        """Raise if the activations of this backward were computed in another state than the forward's."""
        if saved_id.item() != self.state.id.item():
            raise RouteError(_CHANGED.format(layer=self.layer))
        if self.unverified:
            raise RouteError(
                f"`{self.layer}` ran forward inside backward, in a checkpoint that is not torch.utils.checkpoint. "
                "Whether its route is that of its first forward cannot be known. Fix: use torch.utils.checkpoint."
            )


def _reentrant_checkpoint() -> Any:
    """The context of the reentrant checkpoint that is running a forward now, or None.

    Its graph is built inside backward and knows nothing of the first forward, so it has to be found on the stack.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _CHECKPOINT_CODE:
            return frame.f_locals["ctx"]
        frame = frame.f_back
    return None


_CHECKPOINT_CODE = (CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__)

_CHANGED = (
    "Gradient checkpointing recomputed `{layer}` under another route or ablation than its forward ran in, so its "
    "gradients would be wrong. Fix: let `route(...)`, or the ablation, enclose both forward and backward."
)
