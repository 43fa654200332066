"""The three weights of a mask for one forward, laid out as the layer multiplies them.

    [1, m] and [g_d, g_q] in the columns of both blocks' bottlenecks, one row per leading index of x

In the type of x, but at least float32: a weight of 0.3 rounded to bf16 would be off by 0.2 %.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradroute.errors import RouteError

Weights = Float[Tensor, "*batch"]


class Columns(NamedTuple):
    """Weights in the columns of both blocks' bottlenecks, None if all are 0 or 1; and where they are zero."""

    weights: Float[Tensor, "rows ranks"] | None
    zero: Bool[Tensor, "rows ranks"]


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


NO_GATES = Gates()


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
