"""v_1 ... v_k = top right singular vectors of D = f_hack - f_clean, sign by majority vote of sign(D v).

Source: grpo_proj2.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradroute.directions.estimators.base import DEAD, Estimator, Features, Unnormalised, mean_norm
from gradroute.errors import GradRouteError


@dataclass(frozen=True, kw_only=True)
class Svd(Estimator):
    """The top k right singular vectors of D, each with the sign that most pairs give it, sign(D v).

    Args:
        k: rows per module, at most the number of pairs and of coordinates.
        axis_floor: drop rows with S_i / S_0 below it; the first one stays.
        noise_floor: drop rows whose S_i is below this quantile of all singular values of all modules; a module without
            rows left drops out of the score.
        n_heldout, seed, orthogonal_to: see `Estimator`.

    Raises:
        GradRouteError: a number out of range; when called, more rows than pairs or coordinates.
    """

    name: ClassVar[str] = "svd"
    k: int = 1
    axis_floor: float = 0.0
    noise_floor: float = 0.0

    def __post_init__(self) -> None:
        if self.k < 1 or not 0 <= self.axis_floor <= 1 or not 0 <= self.noise_floor < 1:
            raise GradRouteError(
                "`k` should be at least 1, `axis_floor` in [0, 1] and `noise_floor` in [0, 1). Found "
                f"{self.k!r}, {self.axis_floor!r} and {self.noise_floor!r}."
            )

    def estimate(self, hack: Features, clean: Features) -> Unnormalised:
        differences = {name: hack[name] - clean[name] for name in hack}
        for name, D in differences.items():
            if self.k > min(D.shape):
                raise GradRouteError(f"`k` should be at most {min(D.shape)} in `{name}`. Found {self.k}.")
        svd = {name: torch.linalg.svd(D, full_matrices=False)[1:] for name, D in differences.items()}
        floor = torch.cat([S.double().cpu() for S, _ in svd.values()]).quantile(self.noise_floor)
        rows = {}
        for name, (S, Vh) in svd.items():
            alive = S[: self.k] > DEAD * mean_norm(hack[name], clean[name]) * len(hack[name]) ** 0.5
            projections = differences[name] @ Vh[: self.k].T
            votes = projections.sign().sum(0)
            sign = torch.where(votes == 0, projections.sum(0), votes).sign()
            oriented = (alive * sign)[:, None] * Vh[: self.k]
            keep = (S[: self.k] >= self.axis_floor * S[0]) & (S[: self.k] >= floor.to(S))
            if keep.any() or not alive[0]:
                rows[name] = oriented[keep | ~alive[0]]
        return rows, None, None
