"""v = clamp(mean D / (std D / sqrt P), -3, 3), D = f_hack - f_clean, P pairs. Source: vGROUT."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradroute._checks import positive_number
from gradroute.directions.estimators.base import Estimator, Features, Unnormalised, noise


@dataclass(frozen=True, kw_only=True)
class TStatistic(Estimator):
    """v = clamp(mean D / (std D / sqrt P), -clamp, clamp), per coordinate: what is small and reliable counts.

    Args:
        clamp: largest t that counts.
        n_heldout, seed: see `Estimator`.

    Raises:
        GradRouteError: a clamp that is not positive.
    """

    name: ClassVar[str] = "t_statistic"
    least_pairs: ClassVar[int] = 2
    clamp: float = 3.0

    def __post_init__(self) -> None:
        positive_number("clamp", self.clamp)

    def estimate(self, hack: Features, clean: Features) -> Unnormalised:
        rows = {}
        for name in hack:
            D = hack[name] - clean[name]
            mean, error = D.mean(0, keepdim=True), D.std(0, keepdim=True) / len(D) ** 0.5
            # A coordinate whose mean is rounding noise has no t: it would be a ratio of two such numbers.
            t = torch.where(mean.abs() > noise(hack[name], clean[name]), mean / error, 0.0)
            rows[name] = t.clamp(-self.clamp, self.clamp)
        return rows, None, None
