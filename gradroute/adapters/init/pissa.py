"""W = U diag(S) V^T: the largest singular directions of the frozen weight, dealt out to both blocks in turn."""

import torch
from einops import rearrange
from torch import Tensor, nn

from gradroute._typing import typechecked
from gradroute.adapters._singular import top_singular_triplets
from gradroute.adapters.init._split import Frame, alternate, initialise_split


@typechecked
def pissa_(model: nn.Module, *, niter: int | None = None, seed: int = 0) -> nn.Module:
    """W = U diag(S) V^T, largest first: ranks 0, 2, 4, ... to the deployed block, 1, 3, 5, ... to the quarantine.

    The blocks share no direction, so that ablating the quarantine does more than shrink the deployed block.
    With unequal ranks the larger block takes what is left. Unlike PiSSA (Meng et al. 2024, arXiv:2404.02948) the base
    weight keeps these directions and the net delta is zero.

    Args:
        model: with routed layers of LoRA matrices; changed in place and returned.
        niter: None for the exact SVD; otherwise the power iterations of a randomised one (4 is usual).
        seed: of the randomised SVD; the exact one draws nothing.

    Raises:
        TargetError: a rank below 2, more directions than the weight has, a layer whose blocks are no LoRA matrices
            (`SvdGain`), or a weight that is not finite.
        RouteError: inside a route or view, or while PEFT has merged the blocks.
    """
    generator = torch.Generator().manual_seed(seed)

    def frames(_: str, W: Tensor, n_deployed: int, n_quarantine: int) -> tuple[Frame, Frame]:
        U, _S, Vh = top_singular_triplets(W, n_deployed + n_quarantine, niter=niter, generator=generator)
        return alternate(Vh, rearrange(U, "d_out n -> n d_out"), n_deployed, n_quarantine)

    return initialise_split(model, frames)
