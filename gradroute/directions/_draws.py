"""Draws of controls: random rows, or the sides of the pairs exchanged, shuffled or paired in another way.

random      Haar-distributed orthonormal rows; oriented: each with the sign that scores hack above clean
shuffled    estimated from pairs of which half, drawn at random, have their sides swapped
placebo     estimated from the same rollouts, paired so that hacks cancel: (hack a, hack b) and (clean a, clean b)
reversed    the rows negated, the sides swapped
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gradroute.directions.estimators.base import Estimate, Estimator, Features
from gradroute.errors import GradRouteError

Control = Literal["random", "random-oriented", "shuffled", "placebo", "reversed"]
# Placebo pairs may be one fewer than the pairs they are made of.
Sides = tuple[Mapping[str, Float[Tensor, "_ _"]], Mapping[str, Float[Tensor, "_ _"]]]

RANDOM: tuple[Control, ...] = ("random", "random-oriented")
"""The controls that keep their rows."""


def sides(hack: Features, clean: Features, control: Control | None, seed: int | None) -> Sides:
    """The features that play the hack and the clean side for a control; those themselves for None and random rows.

    Raises:
        GradRouteError: a single pair, whose sides cannot be shuffled.
    """
    if control == "reversed":
        return clean, hack
    if control not in ("shuffled", "placebo"):
        return hack, clean
    pairs = len(next(iter(hack.values())))
    if pairs < 2:
        raise GradRouteError(f"A {control} control should have two or more pairs to draw from. Found {pairs}.")
    assert seed is not None
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed)).tolist()
    half = pairs // 2
    if control == "placebo":
        halves = order[:half], order[half : 2 * half]
        a, b = ({name: torch.cat([hack[name][chosen], clean[name][chosen]]) for name in hack} for chosen in halves)
        return a, b
    swapped = torch.zeros(pairs, 1, dtype=torch.bool)
    swapped[order[:half]] = True
    return (
        {name: torch.where(swapped.to(f.device), clean[name], f) for name, f in hack.items()},
        {name: torch.where(swapped.to(f.device), hack[name], f) for name, f in clean.items()},
    )


def haar_rows(k: int, d: int, generator: torch.Generator) -> Float[Tensor, "k d"]:
    """k orthonormal rows in d dimensions, uniformly distributed, in float64."""
    gauss = torch.randn(d, k, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gauss)
    # The sign of R's diagonal is fixed by convention; undoing it makes Q Haar-distributed.
    rows: Tensor = (q * torch.sign(torch.diagonal(r))).T.contiguous()
    return rows


@dataclass(frozen=True)
class Draw:
    """A control with its seed, and the rows of a random one that exists already."""

    control: Control
    seed: int | None
    kept: Mapping[str, Float[Tensor, "_ _"]] | None = None

    def estimate(self, real: Estimate, hack: Features, clean: Features, estimator: Estimator | None) -> Estimate:
        """The estimate that takes the place of the real one from these pairs.

        Raises:
            GradRouteError: the estimator has to be repeated and is not known.
        """
        if self.control == "reversed":
            return real._replace(rows={name: -rows for name, rows in real.rows.items()})
        if self.control in RANDOM:
            rows = self._random(real) if self.kept is None else self.kept
            return real._replace(rows=rows if self.control == "random" else _oriented(rows, real, hack, clean))
        if estimator is None:
            raise GradRouteError(
                f"A {self.control} control repeats the estimator, and that of these directions is not known. "
                "Fix: make the control from freshly extracted directions."
            )
        return estimator(*sides(hack, clean, self.control, self.seed))

    def _random(self, real: Estimate) -> dict[str, Float[Tensor, "_ _"]]:
        assert self.seed is not None
        generator = torch.Generator().manual_seed(self.seed)
        return {name: haar_rows(len(own), own.shape[1], generator).to(own) for name, own in real.rows.items()}


def _oriented(
    rows: Mapping[str, Float[Tensor, "_ _"]], real: Estimate, hack: Features, clean: Features
) -> dict[str, Float[Tensor, "_ _"]]:
    # As the real rows, without a look at the held-out pairs.
    kept = [i for i in range(len(next(iter(hack.values())))) if i not in real.heldout]
    turned = {}
    for name, own in rows.items():
        z = [real.coordinates(name, side[name][kept]) for side in (hack, clean)]
        gap = own @ (z[0] - z[1]).to(own).mean(0)
        turned[name] = torch.where(gap < 0, -1.0, 1.0).to(own)[:, None] * own
    return turned
