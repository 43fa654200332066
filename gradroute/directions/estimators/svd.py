"""v_1 ... v_k = top right singular vectors of D = f_hack - f_clean, sign by majority vote of sign(D v).

Source: grpo_proj2.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradroute._checks import positive_integer
from gradroute.directions.estimators.base import Estimator, Features, Unnormalised, noise
from gradroute.errors import GradRouteError


@dataclass(frozen=True, kw_only=True)
class Svd(Estimator):
    """The top k right singular vectors of D, each with the sign that most pairs give it, sign(D v).

    Args:
        k: rows per module, at most the number of pairs and of coordinates.
        n_heldout, seed: see `Estimator`.

    Raises:
        GradRouteError: k is no positive integer; when called, more rows than pairs or coordinates.
    """

    name: ClassVar[str] = "svd"
    k: int = 1

    def __post_init__(self) -> None:
        positive_integer("k", self.k)

    def estimate(self, hack: Features, clean: Features) -> Unnormalised:
        rows = {}
        for name in hack:
            D = hack[name] - clean[name]
            if self.k > min(D.shape):
                raise GradRouteError(f"`k` should be at most {min(D.shape)} in `{name}`. Found {self.k}.")
            _, S, Vh = torch.linalg.svd(D, full_matrices=False)
            alive = S[: self.k] > noise(hack[name], clean[name]) * len(hack[name]) ** 0.5
            projections = D @ Vh[: self.k].T
            votes = projections.sign().sum(0)
            sign = torch.where(votes == 0, projections.sum(0), votes).sign()
            rows[name] = (alive * sign)[:, None] * Vh[: self.k]
        return rows, None, None
