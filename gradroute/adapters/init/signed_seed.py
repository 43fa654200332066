"""u_in = unit(mean of D), u_out = unit(W u_in): the hack direction and its image, in the quarantine alone."""

import torch
from torch import Tensor, nn

from gradroute._typing import typechecked
from gradroute.adapters.init._split import Differences, Frame, check_names, completed, initialise_split, paired, unit
from gradroute.errors import DeadDirectionError

# Below this share of the norms it is made of, a vector is rounding noise of float32.
_DEAD = 1e-6


@typechecked
def signed_seed_(model: nn.Module, differences: Differences, *, seed: int, reverse: bool = False) -> nn.Module:
    """u_in = unit(mean of D),  u_out = unit(W u_in):  first row of V and first column of U in the quarantine.

    All other rows of V, of both blocks, are random orthonormal ones orthogonal to u_in, and all other columns of U
    orthogonal to u_out: at the start only the quarantine reads the hack direction, or writes its image.

    The sign of the seed does not matter: at zero net delta the first update is even in it. The column of B that
    belongs to u_in learns -lr s dy (u_in . x), which acts as dW = -lr s^2 dy (u_in . x) u_in^T; the row of A that
    belongs to u_out acts as dW = -lr s^2 u_out (u_out . dy) x^T. Both keep their value when u_in and u_out change sign,
    also under Adam, whose step is odd in the gradient. So negated differences are no control; `reverse` is.

    Args:
        model: with routed layers of LoRA matrices; changed in place and returned.
        differences: see `contrastive_covariance_`.
        seed: of the orthogonal frames; the global generator is not used.
        reverse: put the seed in the deployed block instead.

    Raises:
        GradRouteError: see `contrastive_covariance_`.
        DeadDirectionError: the mean difference of a module, or its image under W, is zero up to rounding.
        TargetError, RouteError: see `pissa_`.
    """
    generator = torch.Generator().manual_seed(seed)
    check_names(model, differences)

    def frames(name: str, W: Tensor, n_deployed: int, n_quarantine: int) -> tuple[Frame, Frame]:
        D = paired(differences[name], W)
        mean = D.mean(0)
        if mean.norm() <= _DEAD * D.norm(dim=1).mean():
            raise DeadDirectionError("the paired input differences have mean zero. Fix: drop modules that see none.")
        u_in = unit(mean)
        image = W @ u_in
        if image.norm() <= _DEAD * W.norm():
            raise DeadDirectionError("W maps the mean input difference to zero. Fix: drop modules that do not pass it.")
        count, first = n_deployed + n_quarantine, n_deployed if reverse else n_quarantine
        V, U = (completed(u, count, generator) for u in (u_in, unit(image)))
        seeded, rest = Frame(V[:first], U[:first]), Frame(V[first:], U[first:])
        return (seeded, rest) if reverse else (rest, seeded)

    return initialise_split(model, frames)
