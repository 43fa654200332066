"""Standard error of a difference between arms, by resampling what was sampled: seeds, and prompts within modes.

    d_s = mean over modes of d_sm,   d_sm = sum of the means of its samples,   d = mean over seeds of d_s
    over "prompts":   d* = mean over all S seeds of d_s*, from the prompts of every mode drawn with replacement
    over "seeds":     d* = mean over S seeds drawn with replacement of  d + c (d_s - d) + (d_s* - d_s)
    SE = standard deviation of d*,      interval: d +- t(df) SE,      df = S - 1 over seeds

With s^2 the variance of the d_s, and w^2 that part of it which their prompts explain,

    c^2 = max(0, 1 - w^2 / s^2) S / (S - 1)      so that      E(SE^2) = max(s^2, w^2) / S

With c = 1 the noise of prompts would count twice, and that of seeds (S - 1) / S times (Davison & Hinkley 1997, section
3.8). SE never falls below the noise of prompts, even where the seeds happen to agree.

t and not percentiles: those of three to five seeds end at the extreme seeds and cover 75 to 90 % (Hesterberg 2015, The
American Statistician 69:371). Prompts are drawn from their outcomes and one imagined prompt each way (Agresti & Caffo
2000, The American Statistician 54:280): 64 hacks of 64 are not a certainty.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

Over = Literal["seeds", "prompts"]


@dataclass(frozen=True, eq=False)
class Stratum:
    """One mode of one seed: independent samples whose means add up to d_sm.

    Args:
        values: that an outcome of each sample takes, its weight and sign in the difference included.
        probabilities: of these values when one outcome is drawn again.
        n: number of outcomes in each sample.
    """

    values: Float[np.ndarray, "samples values"]
    probabilities: Float[np.ndarray, "samples values"]
    n: Int[np.ndarray, " samples"]

    @staticmethod
    def counted(
        k: Int[np.ndarray, " samples"], n: Int[np.ndarray, " samples"], weight: Float[np.ndarray, " samples"]
    ) -> "Stratum":
        """In each sample an outcome of `weight` k times, and 0 for the rest."""
        share = (k + 1) / (n + 2)
        return Stratum(np.stack([0 * weight, weight], axis=1), np.stack([1 - share, share], axis=1), n)

    @staticmethod
    def paired(differences: Float[np.ndarray, " prompts"]) -> "Stratum":
        """One sample, of one difference per prompt."""
        n = len(differences)
        values, counts = np.unique(np.append(differences, [-1.0, 1.0]), return_counts=True)
        return Stratum(values[None], counts[None] / (n + 2), np.array([n]))

    @property
    def variance(self) -> float:
        """Of d_sm* around d_sm."""
        deviations = self.values - self._centres[:, None]
        return float(((self.probabilities * deviations**2).sum(axis=1) / self.n).sum())

    def deviations(self, size: int, rng: np.random.Generator) -> Float[np.ndarray, " size"]:
        """d_sm* - d_sm from outcomes drawn again, `size` times."""
        drawn = rng.multinomial(self.n, self.probabilities, (size, len(self.n)))
        means = np.einsum("rsv,sv->rs", drawn, self.values) / self.n
        return np.asarray((means - self._centres).sum(axis=1))

    @property
    def _centres(self) -> Float[np.ndarray, " samples"]:
        return np.asarray((self.probabilities * self.values).sum(axis=1))


@dataclass(frozen=True, eq=False)
class SeedDifference:
    """The difference in one seed.

    Args:
        value: d_s.
        modes: one or more.
    """

    value: float
    modes: Sequence[Stratum]

    @property
    def variance(self) -> float:
        """Of d_s* around d_s."""
        return sum(mode.variance for mode in self.modes) / len(self.modes) ** 2

    def deviations(self, size: int, rng: np.random.Generator) -> Float[np.ndarray, " size"]:
        """d_s* - d_s, `size` times."""
        return np.asarray(sum(mode.deviations(size, rng) for mode in self.modes)) / len(self.modes)


def standard_error(seeds: Sequence[SeedDifference], over: Over, *, resamples: int, rng: np.random.Generator) -> float:
    """SE of the mean over seeds; formula above.

    Args:
        seeds: one or more, over "seeds" two or more.
        over: what another experiment would draw again.
        resamples: number of them; the SE has a relative error of 1 / sqrt(2 resamples).
        rng: draws them.
    """
    S = len(seeds)
    if over == "prompts":
        noise = sum(seed.deviations(resamples, rng) for seed in seeds) / S
        return float(np.std(noise, ddof=1))
    d = np.array([seed.value for seed in seeds])
    s2, w2 = float(d.var(ddof=1)), float(np.mean([seed.variance for seed in seeds]))
    c = (max(s2 - w2, 0.0) / s2 * S / (S - 1)) ** 0.5 if s2 else 0.0
    picked = rng.integers(S, size=(resamples, S))
    resampled = c * d[picked]
    for i, seed in enumerate(seeds):
        resampled[picked == i] += seed.deviations(int((picked == i).sum()), rng)
    return float(resampled.mean(axis=1).std(ddof=1))
