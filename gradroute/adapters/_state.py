"""The state a routed layer reads in its forward.

    state = (open route or none) x (ablation scale) x (adapters disabled or not)

States are immutable and carry an id. A context manager gives a layer a new state and later puts the old object back, so
nothing is written into parameters and an exception restores what was there.
"""

import re
import uuid
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradroute.adapters.mask import RouteMask
from gradroute.errors import RouteError

Weights = Float[Tensor, "*batch"]


class Columns(NamedTuple):
    """Weights in the columns of both blocks' bottlenecks, None if all are 0 or 1; and where they are zero."""

    weights: Float[Tensor, "rows ranks"] | None
    zero: Bool[Tensor, "rows ranks"]


@dataclass(eq=False)
class ActiveRoute:
    """A mask in force; `closed` once its block has ended."""

    mask: RouteMask
    sticky: bool
    closed: bool = False


@dataclass(frozen=True)
class Gates:
    """m, g_d and g_q of one forward, a float per leading index of its input; None means 1 everywhere.

    `binary`: all of them are known to be 0 or 1.
    """

    m: Weights | None = None
    g_d: Weights | None = None
    g_q: Weights | None = None
    binary: bool = False
    _columns: dict[tuple[int, int], tuple[Columns | None, Columns | None]] = field(default_factory=dict, repr=False)

    def columns(self, r: int, r_quarantine: int) -> tuple[Columns | None, Columns | None]:
        """[1, m] and [g_d, g_q] in the columns of both blocks' bottlenecks (rows, r + r_quarantine); None for 1.

        Made once for all layers of one width: spread out in memory, they cost a tenth of what a broadcast along narrow
        rows does.
        """
        if torch.compiler.is_compiling():
            return self._spread(r, r_quarantine)
        if (r, r_quarantine) not in self._columns:
            self._columns[r, r_quarantine] = self._spread(r, r_quarantine)
        return self._columns[r, r_quarantine]

    def _spread(self, r: int, r_quarantine: int) -> tuple[Columns | None, Columns | None]:
        sides = (None, self.m), (self.g_d, self.g_q)
        first, second = (_side_by_side(*each, r, r_quarantine, binary=self.binary) for each in sides)
        return first, second


def _side_by_side(
    left: Weights | None, right: Weights | None, r: int, r_quarantine: int, *, binary: bool
) -> Columns | None:
    if left is None and right is None:
        return None
    like = left if left is not None else right
    assert like is not None
    left, right = (torch.ones_like(like) if each is None else each for each in (left, right))
    dtype = torch.promote_types(left.dtype, right.dtype)
    columns = [each.reshape(-1, 1).to(dtype).expand(-1, width) for each, width in ((left, r), (right, r_quarantine))]
    weights = torch.cat(columns, dim=1)
    return Columns(None if binary else weights, weights == 0)


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
    _axes: dict[int, str] = field(default_factory=dict, repr=False)

    @property
    def quarantine_is_off(self) -> bool:
        """Whether the quarantine is ablated for every row."""
        return isinstance(self.scale, float) and self.scale == 0.0

    @property
    def view(self) -> str:
        """What is shown: "on", "ablated", "scaled" or "disabled"."""
        if self.disabled:
            return "disabled"
        if self.quarantine_is_off:
            return "ablated"
        return "on" if isinstance(self.scale, float) and self.scale == 1.0 else "scaled"

    def gates(self, x: Float[Tensor, "*batch d_in"], layer: str) -> Gates:
        """The three gates, one float per leading index of `x`."""
        if self.route is None and isinstance(self.scale, float) and self.scale == 1.0:
            return NO_GATES
        if torch.compiler.is_compiling():
            return self._spread(x, layer)
        key = (x.shape[:-1], x.device, x.dtype)
        if key not in self._cache:
            # Few shapes occur under one state; a long generation under a sticky state must not grow the cache.
            if len(self._cache) >= 16:
                self._cache.clear()
            self._check_axes(x, layer)
            self._cache[key] = self._spread(x, layer)
        return self._cache[key]

    def _check_axes(self, x: Tensor, layer: str) -> None:
        """Rows must mean the same in every layer: an expert's input (tokens, d) may by chance have `batch` tokens."""
        if self.route is None and isinstance(self.scale, float):
            return
        if x.ndim == 2 and re.search(r"(^|\.)experts\.", layer):
            raise RouteError(
                f"`{layer}` is an expert: it gets the tokens that were sent to it, {tuple(x.shape)} here, and which "
                "rows they come from is not known. Fix: exclude the experts from `target_modules`."
            )
        self._axes.setdefault(x.ndim, layer)
        if len(self._axes) > 1:
            found = ", ".join(f"{ndim} axes in `{name}`" for ndim, name in sorted(self._axes.items(), reverse=True))
            raise RouteError(
                f"The inputs of all layers under one mask should have the same axes. Found {found}: a module that "
                "flattens its tokens, or takes some of them (an expert), cannot be matched with rows. "
                "Fix: exclude it from `target_modules`, or run it under a route of its own."
            )

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
        # A compiled forward is not to depend on a mask's values.
        simple = not torch.compiler.is_compiling() and isinstance(self.scale, float) and self.scale in (0.0, 1.0)
        if mask is None:
            return Gates(m, binary=simple)
        g_d, g_q = _per_row(mask.g_d, x, layer, "mask"), _per_row(mask.g_q, x, layer, "mask")
        return Gates(m, g_d, g_q, binary=simple and mask.is_binary)


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


NO_GATES = Gates()
INITIAL = ForwardState()
"""No route, nothing ablated: the state of every layer outside of `with` blocks. Shared, since states are immutable."""
