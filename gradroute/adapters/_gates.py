"""A mask in force, and its three weights for one forward, laid out as the layer multiplies them.

    [1, m] and [g_d, g_q] in the columns of both blocks' bottlenecks, one row per leading index of x

In the type of x, but at least float32: a weight of 0.3 rounded to bf16 would be off by 0.2 %.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gradroute.adapters.mask import RouteMask
from gradroute.adapters.pending import PendingMask
from gradroute.errors import RouteError

Weights = Float[Tensor, "*batch"]


class Columns(NamedTuple):
    """Weights in the columns of both blocks' bottlenecks, None if all are 0 or 1; and the bits of the values to keep.

    No bit is kept where the weight is zero, every bit elsewhere: so nan and inf become zero as well, in an eighth of
    the time that `masked_fill` takes on a CPU.
    """

    weights: Float[Tensor, "rows ranks"] | None
    bits: Int[Tensor, "rows ranks"]


@dataclass(frozen=True)
class Gates:
    """m, g_d and g_q of one forward, a float per leading index of its input; None means 1 everywhere.

    `binary`: all of them are known to be 0 or 1.
    `decided`: of a mask that is decided after the forward, all three once it is; `m` and `binary` are then of m alone.
    """

    m: Weights | None = None
    g_d: Weights | None = None
    g_q: Weights | None = None
    binary: bool = False
    decided: Callable[[], "Gates"] | None = None
    _columns: dict[tuple[int, int, torch.dtype], "BothColumns"] = field(default_factory=dict, repr=False)

    @property
    def known(self) -> "Gates":
        """All three gates; raises if they have not been decided."""
        return self if self.decided is None else self.decided()

    @property
    def trained(self) -> Bool[Tensor, "2"]:
        """Whether some row trains the deployed block, and whether some row trains the quarantine."""
        m, g_d, g_q = (None if gate is None else gate != 0 for gate in (self.m, self.g_d, self.g_q))
        uses = m if g_q is None else g_q if m is None else m & g_q
        like = next((rows for rows in (g_d, uses) if rows is not None), torch.tensor(True))
        return torch.stack([like.new_ones(()) if rows is None else rows.any() for rows in (g_d, uses)])

    def columns(self, r: int, r_quarantine: int, compute: torch.dtype) -> "BothColumns":
        """[1, m] and [g_d, g_q] in the columns of both blocks' bottlenecks (rows, r + r_quarantine); None for 1.

        Made once for all layers of one width, for values of the type `compute`: spread out in memory, they cost a tenth
        of what a broadcast along narrow rows does.
        """
        if torch.compiler.is_compiling():
            return self._spread(r, r_quarantine, compute)
        key = (r, r_quarantine, compute)
        if key not in self._columns:
            self._columns[key] = self._spread(*key)
        return self._columns[key]

    def _spread(self, r: int, r_quarantine: int, compute: torch.dtype) -> "BothColumns":
        M = self._side_by_side(None, self.m, r, r_quarantine, compute)
        if self.decided is not None:
            return M, Undecided(self, r, r_quarantine, compute)
        return M, self._side_by_side(self.g_d, self.g_q, r, r_quarantine, compute)

    def _side_by_side(
        self, left: Weights | None, right: Weights | None, r: int, r_quarantine: int, compute: torch.dtype
    ) -> Columns | None:
        like = right if left is None else left
        if like is None:
            return None
        left, right = (torch.ones_like(like) if each is None else each for each in (left, right))
        dtype = torch.promote_types(left.dtype, right.dtype)
        columns = [each.reshape(-1, 1).to(dtype).expand(-1, n) for each, n in ((left, r), (right, r_quarantine))]
        weights = torch.cat(columns, dim=1)
        # -1 has every bit.
        return Columns(None if self.binary else weights, -(weights != 0).to(_INTEGERS[compute.itemsize]))


class Undecided(NamedTuple):
    """In the place of [g_d, g_q] in a forward whose mask is decided after it."""

    gates: Gates
    r: int
    r_quarantine: int
    compute: torch.dtype

    def columns(self) -> Columns | None:
        """[g_d, g_q], in backward; raises if they have not been decided."""
        _, G = self.gates.known.columns(self.r, self.r_quarantine, self.compute)
        assert not isinstance(G, Undecided)
        return G


BothColumns = tuple[Columns | None, Columns | Undecided | None]
NO_GATES = Gates()


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_type(x: Tensor) -> torch.dtype:
    """The type of the weights for an input: its own, but at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def weights_for(values: Float[Tensor, "*rows"], x: Float[Tensor, "*batch d_in"], layer: str, what: str) -> Weights:
    """`values`, one per row or token, as one per leading index of `x`.

    Args:
        values: aligned with the axes of `x` on the left.
        x: input of the layer.
        layer: its name, for the error.
        what: the kind of values, for the error: "mask" or "ablation rows".

    Raises:
        RouteError: the rows or tokens are not those of `x`.
    """
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
    values = values.to(x.device, weights_type(x)).reshape(values.shape + (1,) * (len(lead) - values.ndim))
    return values.expand(lead).clone(memory_format=torch.contiguous_format)


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

    def trains_ablated_rows(self, scale: float | Tensor) -> bool:
        """Whether a row that is to train the quarantine is ablated, under this scale of the quarantine."""
        if isinstance(scale, float) and scale != 0.0:
            return False
        # Of rows that are not decided yet, any that uses the quarantine may come to train it.
        trains = self.m != 0 if self.parameter_gates is None else (self.m != 0) & (self.parameter_gates[1] != 0)
        if not isinstance(scale, Tensor):
            return bool(trains.any())
        aligned = _aligned(trains, scale == 0)
        # Rows of another batch are refused by the first forward.
        return aligned is not None and bool((aligned[0] & aligned[1]).any())

    def _decided(self, like: Tensor, layer: str, m: Weights | None, binary: bool) -> Gates:
        assert isinstance(self.mask, PendingMask)
        mask = self.mask.decided
        g_d, g_q = (weights_for(_wide(gate), like, layer, "mask") for gate in (mask.g_d, mask.g_q))
        return Gates(m, g_d, g_q, binary=binary and mask.is_binary)


def _wide(weights: Tensor) -> Tensor:
    return weights.to(torch.float32 if weights.device.type == "mps" else torch.float64)


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
