"""Rows of directions: dealt out to the blocks, completed to an orthonormal frame, drawn, normed."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from gradroute.adapters.init._split import Frame
from gradroute.errors import TargetError


def alternate(
    V: Float[Tensor, "n d_in"], U: Float[Tensor, "n d_out"], n_deployed: int, n_quarantine: int
) -> tuple[Frame, Frame]:
    """Ranks 0, 2, ... and 1, 3, ...; once the smaller block is full, the other takes the rest."""
    ranks = list(range(n_deployed + n_quarantine))
    pairs = min(n_deployed, n_quarantine)
    even, odd, rest = ranks[: 2 * pairs : 2], ranks[1 : 2 * pairs : 2], ranks[2 * pairs :]
    deployed = even + rest if n_deployed > n_quarantine else even
    quarantine = odd if n_deployed > n_quarantine else odd + rest
    return Frame(V[deployed], U[deployed]), Frame(V[quarantine], U[quarantine])


def completed(first: Float[Tensor, " d"], count: int, generator: torch.Generator) -> Float[Tensor, "count d"]:
    """`first`, and count - 1 random orthonormal rows orthogonal to it."""
    d = len(first)
    if count > d:
        raise TargetError(f"{count} orthogonal directions were asked in {d} dimensions. Fix: lower r or r_quarantine.")
    columns = torch.cat([first[:, None], normal(d, count - 1, generator, first)], dim=1)
    others = rearrange(torch.linalg.qr(columns).Q[:, 1:], "d n -> n d")
    return torch.cat([first[None], others])


def normal(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Float[Tensor, "{rows} {columns}"]:
    # Drawn on the CPU in float32, so that a seed gives the same model on every device and in every dtype.
    return torch.randn(rows, columns, generator=generator, device="cpu", dtype=torch.float32).to(like)


def unit(rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    lengths: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / lengths
