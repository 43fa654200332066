"""The three weights of a mask for one forward, laid out as the layer multiplies them.

    [1, m] and [g_d, g_q] in the columns of both blocks' bottlenecks, one row per leading index of x

In the type of x, but at least float32: a weight of 0.3 rounded to bf16 would be off by 0.2 %.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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
    _columns: dict[tuple[int, int, torch.dtype], tuple[Columns | None, "Columns | Undecided | None"]] = field(
        default_factory=dict, repr=False
    )

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

    def columns(
        self, r: int, r_quarantine: int, compute: torch.dtype
    ) -> tuple[Columns | None, "Columns | Undecided | None"]:
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

    def _spread(
        self, r: int, r_quarantine: int, compute: torch.dtype
    ) -> tuple[Columns | None, "Columns | Undecided | None"]:
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
    values = values.to(x.device, weights_type(x))
    return (
        values.reshape(values.shape + (1,) * (len(lead) - values.ndim))
        .expand(lead)
        .clone(memory_format=torch.contiguous_format)
    )
