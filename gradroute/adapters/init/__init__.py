"""Oriented initialisations of both blocks, in the style of `torch.nn.init`: `gradroute.adapters.init.pissa_(model)`.

    A = [V; 0],  B = [0, U]:      B A = 0 exactly; see `split`

V holds input directions as rows, U output directions as columns. All have length one (`gaussian_`: in the mean), so
that schemes compare at one learning rate. The net delta is zero bitwise and the frozen weight untouched. Values of A
and B are overwritten, trained ones too; an optimizer that holds moments of them should be made anew. If a function
raises, nothing was written.
"""

import math
from collections.abc import Mapping

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._protocol import routed_layers
from gradroute._typing import typechecked
from gradroute.adapters._singular import top_singular_triplets
from gradroute.adapters.init._split import Frame, initialise_split
from gradroute.errors import DeadDirectionError, GradRouteError, TargetError

Differences = Mapping[str, Float[Tensor, "_ _"]]
"""Module name -> (pairs, d_in): input of the hack minus input of the clean side of each pair."""

# Below this share of the norms it is made of, a vector is rounding noise of float32.
_DEAD = 1e-6


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
        V, U = (_normal(n_deployed + n_quarantine, d, generator, W) / math.sqrt(d) for d in (d_in, d_out))
        return Frame(V[:n_deployed], U[:n_deployed]), Frame(V[n_deployed:], U[n_deployed:])

    return initialise_split(model, frames)


@typechecked
def pissa_(model: nn.Module, *, niter: int | None = None, seed: int = 0) -> nn.Module:
    """W = U diag(S) V^T, largest first: ranks 0, 2, 4, ... to the deployed block, 1, 3, 5, ... to the quarantine.

    No direction is in both: in a basis of its own, ablating the quarantine is more than shrinking the deployed block.
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
        return _alternate(Vh, rearrange(U, "d_out n -> n d_out"), n_deployed, n_quarantine)

    return initialise_split(model, frames)


@typechecked
def contrastive_covariance_(
    model: nn.Module,
    differences: Differences,
    *,
    ridge: float = 1e-3,
    input_variance: Mapping[str, float] | None = None,
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
        ridge: a = ridge * variance.
        input_variance: module name -> the variance, as a mean over the module's d_in inputs. None takes the mean square
            of D, which is all that the differences tell.
        niter, seed: see `pissa_`.

    Raises:
        GradRouteError: `differences` or `input_variance` names other modules than the routed ones, has another width,
            no pair, or values that are not finite; `ridge` or a variance is not positive.
        DeadDirectionError: all differences of a module are zero.
        TargetError, RouteError: see `pissa_`.

    Source: CorDA (Yang et al. 2024, arXiv:2406.05223), with the covariance of paired differences.
    """
    generator = torch.Generator().manual_seed(seed)
    _check_names(model, "differences", differences)
    _check_positive("ridge", ridge)
    if input_variance is not None:
        _check_names(model, "input_variance", input_variance)
        for name, variance in input_variance.items():
            _check_positive(f"input_variance[{name!r}]", variance)

    def frames(name: str, W: Tensor, n_deployed: int, n_quarantine: int) -> tuple[Frame, Frame]:
        D = _paired(differences[name], W)
        if not D.any():
            raise DeadDirectionError("all paired input differences are zero. Fix: drop modules that see no difference.")
        variance = D.square().mean().item() if input_variance is None else input_variance[name]
        root_a = math.sqrt(ridge * variance)
        _L, s, Qh = torch.linalg.svd(D, full_matrices=False)
        excess = torch.sqrt(s.square() / len(D) + root_a**2) - root_a
        W_root_C = root_a * W + ((W @ Qh.T) * excess) @ Qh
        U, _S, _Vh = top_singular_triplets(W_root_C, n_deployed + n_quarantine, niter=niter, generator=generator)
        # S V^T C^(-1/2) = U^T W: the same rows, without dividing by the small root of C.
        return _alternate(_unit(U.T @ W), rearrange(U, "d_out n -> n d_out"), n_deployed, n_quarantine)

    return initialise_split(model, frames)


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
    _check_names(model, "differences", differences)

    def frames(name: str, W: Tensor, n_deployed: int, n_quarantine: int) -> tuple[Frame, Frame]:
        D = _paired(differences[name], W)
        mean = D.mean(0)
        if mean.norm() <= _DEAD * D.norm(dim=1).mean():
            raise DeadDirectionError("the paired input differences have mean zero. Fix: drop modules that see none.")
        u_in = _unit(mean)
        image = W @ u_in
        if image.norm() <= _DEAD * W.norm():
            raise DeadDirectionError("W maps the mean input difference to zero. Fix: drop modules that do not pass it.")
        count, first = n_deployed + n_quarantine, n_deployed if reverse else n_quarantine
        V, U = (_completed(u, count, generator) for u in (u_in, _unit(image)))
        seeded, rest = Frame(V[:first], U[:first]), Frame(V[first:], U[first:])
        return (seeded, rest) if reverse else (rest, seeded)

    return initialise_split(model, frames)


def _alternate(
    V: Float[Tensor, "n d_in"], U: Float[Tensor, "n d_out"], n_deployed: int, n_quarantine: int
) -> tuple[Frame, Frame]:
    """Ranks 0, 2, ... and 1, 3, ...; once the smaller block is full, the other takes the rest."""
    ranks = list(range(n_deployed + n_quarantine))
    pairs = min(n_deployed, n_quarantine)
    even, odd, rest = ranks[: 2 * pairs : 2], ranks[1 : 2 * pairs : 2], ranks[2 * pairs :]
    deployed = even + rest if n_deployed > n_quarantine else even
    quarantine = odd if n_deployed > n_quarantine else odd + rest
    return Frame(V[deployed], U[deployed]), Frame(V[quarantine], U[quarantine])


def _completed(first: Float[Tensor, " d"], count: int, generator: torch.Generator) -> Float[Tensor, "count d"]:
    """`first`, and count - 1 random orthonormal rows orthogonal to it."""
    d = len(first)
    if count > d:
        raise TargetError(f"{count} orthogonal directions were asked in {d} dimensions. Fix: lower r or r_quarantine.")
    columns = torch.cat([first[:, None], _normal(d, count - 1, generator, first)], dim=1)
    others = rearrange(torch.linalg.qr(columns).Q[:, 1:], "d n -> n d")
    return torch.cat([first[None], others])


def _normal(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Float[Tensor, "{rows} {columns}"]:
    # Drawn on the CPU in float32, so that a seed gives the same model on every device and in every dtype.
    return torch.randn(rows, columns, generator=generator, device="cpu", dtype=torch.float32).to(like)


def _unit(rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    lengths: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / lengths


def _paired(D: Tensor, W: Float[Tensor, "d_out d_in"]) -> Float[Tensor, "pairs d_in"]:
    if D.ndim != 2 or D.shape[1] != W.shape[1]:
        raise GradRouteError(
            f"`differences` should be {W.shape[1]} wide, like its input. Found {tuple(D.shape)}. "
            'Fix: extract with features="input" and give Directions.differences().'
        )
    if len(D) < 1 or not torch.isfinite(D).all():
        bad = int((~torch.isfinite(D)).sum())
        raise GradRouteError(
            f"`differences` should be finite, of one pair or more. Found {len(D)} pairs, {bad} bad values."
        )
    return D.detach().to(W)


def _check_positive(argument: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise GradRouteError(f"`{argument}` should be positive and finite. Found {value}.")


def _check_names(model: nn.Module, argument: str, given: Mapping[str, object]) -> None:
    layers = routed_layers(model)
    missing, unknown = [n for n in layers if n not in given], [n for n in given if n not in layers]
    if missing or unknown:
        raise GradRouteError(
            f"`{argument}` should name every routed module and no other. Missing: {missing[:5]}; unknown: "
            f"{unknown[:5]}. Fix: extract the directions from this model."
        )
