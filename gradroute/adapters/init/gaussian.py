"""V_ij ~ N(0, 1 / d_in), U_ij ~ N(0, 1 / d_out): no orientation."""

import math

import torch
from torch import Tensor, nn

from gradroute._typing import typechecked
from gradroute.adapters.init._split import Frame, initialise_split, normal


@typechecked
def gaussian_(model: nn.Module, *, seed: int) -> nn.Module:
    """V_ij ~ N(0, 1 / d_in), U_ij ~ N(0, 1 / d_out): no orientation, the control of the schemes below.

    Args:
        model: with routed layers of LoRA matrices; changed in place and returned.
        seed: the global generator is not used.

    Raises:
        TargetError, RouteError: see `pissa_`; the rank is not bounded by the widths here.
    """
    generator = torch.Generator().manual_seed(seed)

    def frames(_: str, W: Tensor, n_deployed: int, n_quarantine: int) -> tuple[Frame, Frame]:
        d_out, d_in = W.shape
        V, U = (normal(n_deployed + n_quarantine, d, generator, W) / math.sqrt(d) for d in (d_in, d_out))
        return Frame(V[:n_deployed], U[:n_deployed]), Frame(V[n_deployed:], U[n_deployed:])

    return initialise_split(model, frames)
