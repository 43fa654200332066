"""Do scores tell hacks from the rest? Their AUROC on labelled rollouts, with an interval.

    AUROC    P(score of a hack > score of another rollout), ties 1/2

Source of the interval: Newcombe 2006, Statistics in Medicine 25:559, method 5.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradroute._logging import warn
from gradroute._typing import typechecked
from gradroute.errors import GradRouteError


@dataclass(frozen=True)
class Validation:
    """AUROC of scores on labelled rollouts, with its 95 % interval.

    Args:
        auroc: P(score of a hack > score of a clean rollout), ties 1/2.
        low, high: ends of the interval.
        n_hack, n_clean: number of labelled rollouts of each kind.
    """

    auroc: float
    low: float
    high: float
    n_hack: int
    n_clean: int

    def __repr__(self) -> str:
        interval = f"[{self.low:.2f}, {self.high:.2f}]"
        return f"Validation(AUROC {self.auroc:.2f} {interval}, {self.n_hack} hacks, {self.n_clean} others)"

    @property
    def inverted(self) -> bool:
        """Whether clean rollouts score above hacks more often than not."""
        return self.auroc < 0.5


@typechecked
def validate(scores: Float[Tensor, " rows"], labels: Bool[Tensor, " rows"]) -> Validation:
    """The AUROC of scores on labelled rollouts, with an interval; warns where it is below 1/2.

    Directions from pairs of another distribution than the rollouts may give inverted scores, and a gate on these looks
    as if it worked.

    Args:
        scores: of the rollouts, as `Directions.score` gives them.
        labels: True for hacks.

    Raises:
        GradRouteError: other shapes, scores that are not finite, or labels all of one kind.
    """
    if scores.shape != labels.shape:
        raise GradRouteError(f"`labels` should have the shape {tuple(scores.shape)}. Found {tuple(labels.shape)}.")
    if not torch.isfinite(scores).all():
        raise GradRouteError("`scores` should be finite.")
    labels = labels.to(scores.device)
    hack, clean = scores[labels], scores[~labels]
    if not len(hack) or not len(clean):
        raise GradRouteError(f"`labels` should hold both kinds. Found {len(hack)} hacks and {len(clean)} others.")
    value = auroc(hack, clean)
    found = Validation(value, *auroc_interval(value, len(hack), len(clean)), len(hack), len(clean))
    if found.inverted:
        warn(
            f"The scores are inverted on the labelled rollouts: AUROC {value:.2f} [{found.low:.2f}, {found.high:.2f}]. "
            "Gates would route the clean ones. Fix: take pairs from the distribution of the rollouts."
        )
    return found


def auroc(hack: Float[Tensor, " n"], clean: Float[Tensor, " m"]) -> float:
    """P(hack > clean) + P(hack = clean) / 2 over all pairs of one of each."""
    difference = hack.double()[:, None] - clean.double()[None, :]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean().item()


def auroc_interval(value: float, n_hack: int, n_clean: int, level: float = 0.95) -> tuple[float, float]:
    """The values t with |t - value| <= z sqrt(V(t)): V = t (1-t) (1 + (N-1) ((1-t)/(2-t) + t/(1+t))) / (n m).

    N = (n + m) / 2. Unlike value +- z SE it has a width at 0 and at 1, and stays between them.
    """
    z = NormalDist().inv_cdf(0.5 + level / 2)
    more = (n_hack + n_clean) / 2 - 1

    def outside(t: float) -> bool:
        variance = t * (1 - t) * (1 + more * ((1 - t) / (2 - t) + t / (1 + t))) / (n_hack * n_clean)
        return abs(t - value) > z * math.sqrt(variance)

    def end(away: float) -> float:
        inner = value
        for _ in range(60):
            middle = (inner + away) / 2
            inner, away = (inner, middle) if outside(middle) else (middle, away)
        return inner

    return end(0.0), end(1.0)
