"""The largest singular triplets of a matrix, exact or randomised.

    M ~ U diag(S) Vh,      U (d_out, k), S (k,), Vh (k, d_in)

Randomised: Q spans (M M^T)^niter M G for a Gaussian G of 2 k + 10 columns; then the exact SVD of the small Q^T M.
Source: Halko, Martinsson & Tropp 2011, algorithm 4.4. With all columns of G it is the exact one.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from gradroute.errors import GradRouteError, TargetError


def top_singular_triplets(
    matrix: Float[Tensor, "d_out d_in"],
    k: int,
    *,
    niter: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Float[Tensor, "d_out k"], Float[Tensor, " k"], Float[Tensor, "k d_in"]]:
    """U, S, Vh of the k largest singular values, in the dtype of `matrix` (float32 or float64).

    Args:
        matrix: finite.
        k: number of triplets.
        niter: power iterations of the randomised method, as in `torch.svd_lowrank`; None is exact.
        generator: source of G, on the CPU; needed with `niter`.

    Raises:
        TargetError: `matrix` has no k singular values above rounding noise.
        GradRouteError: `niter` is negative.
    """
    if niter is not None and niter < 0:
        raise GradRouteError(f"`niter` should be at least 0, or None for the exact SVD. Found {niter}.")
    widest = min(matrix.shape)
    if k > widest:
        raise TargetError(
            f"{k} singular directions were asked of a matrix of shape {tuple(matrix.shape)}, which has {widest}. "
            "Fix: lower r or r_quarantine, or exclude the module."
        )
    if niter is None:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        Q = _range(matrix, min(2 * k + 10, widest), niter, generator)
        U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
        U = Q @ U
    # Directions of singular values at rounding level are arbitrary, and a gain on them would move nothing.
    noise = S[0].item() * max(matrix.shape) * torch.finfo(S.dtype).eps
    offered = int((noise < S).sum())
    if k > offered:
        raise TargetError(
            f"{k} singular directions were asked of a matrix of rank {offered}, shape {tuple(matrix.shape)}. "
            "Fix: lower r or r_quarantine, or exclude the module."
        )
    # Slices would keep the whole decomposition alive, and in every copy that is saved.
    first = (U[:, :k], S[:k], Vh[:k])
    U, S, Vh = (t.clone(memory_format=torch.contiguous_format) for t in first)
    return U, S, Vh


def _range(
    matrix: Float[Tensor, "d_out d_in"], columns: int, niter: int, generator: torch.Generator | None
) -> Float[Tensor, "d_out columns"]:
    # Drawn on the CPU in float32, so that a seed gives the same directions on every device.
    G = torch.randn(matrix.shape[1], columns, generator=generator, device="cpu", dtype=torch.float32).to(matrix)
    Q: Tensor = torch.linalg.qr(matrix @ G).Q
    for _ in range(niter):
        Q = torch.linalg.qr(matrix.T @ Q).Q
        Q = torch.linalg.qr(matrix @ Q).Q
    return Q
