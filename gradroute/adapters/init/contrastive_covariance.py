"""W C^(1/2) = U diag(S) V^T, C = D^T D / P + a I: what carries most of the difference between the sides through W."""

import math

import torch
from einops import rearrange
from torch import Tensor, nn

from gradroute._checks import positive_number
from gradroute._typing import typechecked
from gradroute.adapters._singular import top_singular_triplets
from gradroute.adapters.init._split import Differences, Frame, alternate, check_names, initialise_split, paired, unit
from gradroute.errors import DeadDirectionError


@typechecked
def contrastive_covariance_(
    model: nn.Module,
    differences: Differences,
    *,
    ridge: float = 1e-3,
    niter: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """C = D^T D / P + a I,   W C^(1/2) = U diag(S) V^T:   output directions U, input directions V^T C^(-1/2).

    So W = U diag(S) V^T C^(-1/2): the directions through which W carries most of the difference between the sides.
    Ranks 0, 2, 4, ... go to the deployed block, 1, 3, 5, ... to the quarantine: both read contrastive features, none
    the same. The first, most contrastive one is the deployed block's; `signed_seed_` gives one to the quarantine.
    Beyond the P directions of the pairs, the ridge ranks the others as `pissa_` does.

    C is never formed: with D = L diag(s) Q^T, C^(1/2) = sqrt(a) I + Q (diag(sqrt(s^2 / P + a)) - sqrt(a) I) Q^T.

    Args:
        model: with routed layers of LoRA matrices; changed in place and returned.
        differences: module name -> D (pairs, d_in), hack minus clean; `Directions.differences()` of directions
            extracted with features="input".
        ridge: a = ridge * (mean square of D), so that the scale of the differences does not matter.
        niter, seed: see `pissa_`.

    Raises:
        GradRouteError: `differences` names other modules than the routed ones, has another width, no pair, or values
            that are not finite; `ridge` is not positive.
        DeadDirectionError: all differences of a module are zero.
        TargetError, RouteError: see `pissa_`.

    Source: CorDA (Yang et al. 2024, arXiv:2406.05223), with the covariance of paired differences.
    """
    generator = torch.Generator().manual_seed(seed)
    check_names(model, differences)
    positive_number("ridge", ridge)

    def frames(name: str, W: Tensor, n_deployed: int, n_quarantine: int) -> tuple[Frame, Frame]:
        D = paired(differences[name], W)
        if not D.any():
            raise DeadDirectionError("all paired input differences are zero. Fix: drop modules that see no difference.")
        root_a = math.sqrt(ridge * D.square().mean().item())
        _L, s, Qh = torch.linalg.svd(D, full_matrices=False)
        excess = torch.sqrt(s.square() / len(D) + root_a**2) - root_a
        W_root_C = root_a * W + ((W @ Qh.T) * excess) @ Qh
        U, _S, _Vh = top_singular_triplets(W_root_C, n_deployed + n_quarantine, niter=niter, generator=generator)
        # S V^T C^(-1/2) = U^T W: the same rows, without dividing by the small root of C.
        return alternate(unit(U.T @ W), rearrange(U, "d_out n -> n d_out"), n_deployed, n_quarantine)

    return initialise_split(model, frames)
