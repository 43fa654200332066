"""Ridge regression from the features of all modules to hack or clean, in closed form with as many unknowns as sides.

    w = argmin sum_i (y_i - b - sum over modules <w, z_i>)^2 + penalty |w|^2,    y = +1 hack, -1 clean,  z = (f - c) / s
    (K + penalty I) a + b 1 = y,   1^T a = 0,   K = sum over modules of Z Z^T,      w = Z^T a   per module

Pairs are few and features many: K has 2 P rows. Residuals of a fit without one pair, with C the map y -> a:
e_I = (C_II)^-1 a_I. Source: Cawley 2006, leave-one-out cross-validation of least-squares support vector machines.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from gradroute._transfers import moved_together, read_together
from gradroute.directions.estimators.base import (
    DEAD,
    Estimator,
    Features,
    Unnormalised,
    Vectors,
    noise,
    standardisation,
)
from gradroute.errors import GradRouteError


@dataclass(frozen=True, kw_only=True)
class Ridge(Estimator):
    """Ridge regression with an intercept of the labels +1 (hack) and -1 (clean), all modules jointly: w = Z^T a.

    Args:
        penalty: None takes the one whose squared residuals on a pair, fitted without that pair, are least; the
            residuals are exact but for scale and centre, which are of all pairs.
        standardise: centre and scale every coordinate over the pairs' features first.
        n_heldout, seed: see `Estimator`.

    Raises:
        GradRouteError: a penalty that is not positive.
    """

    name: ClassVar[str] = "ridge"
    least_pairs: ClassVar[int] = 2
    penalty: float | None = None
    standardise: bool = True

    def __post_init__(self) -> None:
        if self.penalty is not None and not 0 < self.penalty < float("inf"):
            raise GradRouteError(f"`penalty` should be positive, or None to choose it. Found {self.penalty!r}.")

    def estimate(self, hack: Features, clean: Features) -> Unnormalised:
        centre, scale = standardisation(hack, clean)
        if not self.standardise:
            scale = {name: torch.ones_like(s) for name, s in scale.items()}
        # On the CPU in float64: K is small, and nearly singular where the penalty is. (MPS has no float64.)
        standardised = [(torch.cat([hack[name], clean[name]]) - centre[name]) / scale[name] for name in hack]
        z = dict(zip(hack, moved_together(standardised, torch.device("cpu")), strict=True))
        K = torch.stack([of_module.double() @ of_module.double().T for of_module in z.values()]).sum(0)
        y = torch.cat([torch.ones(len(K) // 2), -torch.ones(len(K) // 2)]).double()
        # y^T K y is the squared difference of the classes: where it is rounding noise, so is every w.
        if y @ K @ y <= DEAD**2 * len(y) * K.trace():
            return {name: torch.zeros_like(f[:1]) for name, f in hack.items()}, centre, scale
        penalty = best_penalty(K, y) if self.penalty is None else self.penalty
        a = _dual(K, penalty) @ y
        weights = [(a @ z[name].double())[None].to(hack[name].dtype) for name in hack]
        w = dict(zip(hack, moved_together(weights, next(iter(hack.values())).device), strict=True))
        rows = {}
        for name in hack:
            same = (hack[name] - clean[name]).norm(dim=1).max() <= noise(hack[name], clean[name])
            rows[name] = torch.where(same, 0.0, w[name].to(hack[name]))
        return rows, centre, scale

    def normalise(self, rows: dict[str, Float[Tensor, "_ _"]], scale: Vectors | None) -> Vectors:
        """s / |w| times the norm of all w: the weights of the modules stay in the scores."""
        assert scale is not None
        norms = torch.tensor(read_together(v.norm() for v in rows.values()), dtype=torch.float64)
        factors = (norms.norm() / norms).tolist()
        return {name: scale[name] * factor for name, factor in zip(rows, factors, strict=True)}


def best_penalty(K: Float[Tensor, "sides sides"], y: Float[Tensor, " sides"]) -> float:
    """The penalty of 10^-4, 10^-3.5, ... 10^4 times the mean of K's diagonal with the least left-out residuals."""
    mean = K.diagonal().mean()
    penalties = [float(mean * 10 ** (i / 2)) for i in range(-8, 9)]
    return min(penalties, key=lambda penalty: float(leave_one_pair_out(K, y, penalty).square().sum()))


def leave_one_pair_out(
    K: Float[Tensor, "sides sides"], y: Float[Tensor, " sides"], penalty: float
) -> Float[Tensor, " sides"]:
    """y minus the prediction of a fit without that pair (sides i and i + P): e_I = (C_II)^-1 (C y)_I."""
    C = _dual(K, penalty)
    residual = C @ y
    pairs = rearrange(torch.arange(len(K)), "(side pair) -> pair side", side=2)
    e = torch.linalg.solve(C[pairs[:, :, None], pairs[:, None, :]], residual[pairs][..., None])[..., 0]
    left_out: Tensor = rearrange(e, "pair side -> (side pair)")
    return left_out


def _dual(K: Float[Tensor, "sides sides"], penalty: float) -> Float[Tensor, "sides sides"]:
    """C with a = C y: the upper left block of the inverse of [[K + penalty I, 1], [1^T, 0]]."""
    M = K + penalty * torch.eye(len(K), dtype=K.dtype)
    inverse = torch.linalg.inv(M)
    ones = inverse.sum(1)
    C: Tensor = inverse - torch.outer(ones, ones) / ones.sum()
    return C
