"""v = mean over pairs of f_hack - f_clean, per module. Source: repeng, steering-vectors."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradroute.directions.estimators.base import Estimator, Features, Unnormalised, noise, standardisation


@dataclass(frozen=True, kw_only=True)
class MeanDifference(Estimator):
    """v = mean over pairs of (f_hack - f_clean).

    Args:
        standardise: centre and scale every coordinate over the pairs' features first: v = mean D / s, for scores of
            (f - c) / s. A coordinate that is the same in all pairs gets the module's own size as its scale.
        n_heldout, seed: see `Estimator`.
    """

    name: ClassVar[str] = "mean_difference"
    standardise: bool = False

    def estimate(self, hack: Features, clean: Features) -> Unnormalised:
        centre, scale = standardisation(hack, clean) if self.standardise else (None, None)
        rows = {}
        for name in hack:
            v = (hack[name] - clean[name]).mean(0, keepdim=True)
            alive = v.norm() > noise(hack[name], clean[name])
            rows[name] = torch.where(alive, v if scale is None else v / scale[name], 0.0)
        return rows, centre, scale
