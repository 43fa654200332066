"""From the features of the pairs to directions. D = f_hack - f_clean, a row per pair; P pairs; everything per module.

    mean_difference   v = mean D                                  with standardise: z = (f - c) / s first
    t_statistic       v = clamp(mean D / (std D / sqrt P), -3, 3)
    svd               v_1 ... v_k = top right singular vectors of D, sign by majority vote of sign(D v)
    ridge             w = argmin sum_i (y_i - b - sum_modules <w, z_i>)^2 + penalty |w|^2,   y = +1 hack, -1 clean

c and s are mean and standard deviation of each coordinate over both sides of the pairs. Rows have unit norm; ridge
weighs modules against each other, and keeps its weights in the scale: <w, z> = <w / |w|, (f - c) / (s / |w|)>.
Sources: mean difference, repeng / steering-vectors; t-statistic, vGROUT; svd, grpo_proj2; leave-one-out residuals of
a ridge with intercept in the dual, Cawley 2006 (doi:10.1109/IJCNN.2006.246634).
"""

import ast
from dataclasses import dataclass
from typing import ClassVar

import torch

from gradroute.directions.estimator import DEAD, Estimator, Features, Unnormalised, mean_norm, standardisation
from gradroute.directions.ridge import Ridge
from gradroute.errors import GradRouteError


@dataclass(frozen=True, kw_only=True)
class MeanDifference(Estimator):
    """v = mean over pairs of (f_hack - f_clean).

    Args:
        standardise: centre and scale every coordinate over the pairs' features first: v = mean D / s, for scores of
            (f - c) / s. A coordinate that is the same in all pairs gets the module's own size as its scale.
        n_heldout, seed, orthogonal_to: see `Estimator`.
    """

    name: ClassVar[str] = "mean_difference"
    standardise: bool = False

    def estimate(self, hack: Features, clean: Features) -> Unnormalised:
        centre, scale = standardisation(hack, clean) if self.standardise else (None, None)
        rows = {}
        for name in hack:
            v = (hack[name] - clean[name]).mean(0, keepdim=True)
            alive = v.norm() > DEAD * mean_norm(hack[name], clean[name])
            rows[name] = (v if scale is None else v / scale[name]) if alive else torch.zeros_like(v)
        return rows, centre, scale


@dataclass(frozen=True, kw_only=True)
class TStatistic(Estimator):
    """v = clamp(mean D / (std D / sqrt P), -clamp, clamp), per coordinate: what is small and reliable counts.

    Args:
        clamp: largest t that counts.
        n_heldout, seed, orthogonal_to: see `Estimator`.

    Raises:
        GradRouteError: a clamp that is not positive.
    """

    name: ClassVar[str] = "t_statistic"
    least_pairs: ClassVar[int] = 2
    clamp: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.clamp < float("inf"):
            raise GradRouteError(f"`clamp` should be a positive number. Found {self.clamp!r}.")

    def estimate(self, hack: Features, clean: Features) -> Unnormalised:
        rows = {}
        for name in hack:
            D = hack[name] - clean[name]
            noise = DEAD * mean_norm(hack[name], clean[name])
            mean, error = D.mean(0, keepdim=True), D.std(0, keepdim=True) / len(D) ** 0.5
            # A coordinate whose mean is rounding noise has no t: it would be a ratio of two such numbers.
            rows[name] = torch.where(mean.abs() > noise, mean / error, 0.0).clamp(-self.clamp, self.clamp)
        return rows, None, None


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


def as_estimator(estimator: "str | Estimator") -> Estimator:
    """An estimator from itself, or from what `str` of it gives: "ridge", "svd(k=2)"; without `orthogonal_to`.

    Raises:
        GradRouteError: no such estimator or setting.
    """
    if isinstance(estimator, Estimator):
        return estimator
    kinds = {kind.name: kind for kind in (MeanDifference, TStatistic, Svd, Ridge)}
    try:
        parsed = ast.parse(estimator, mode="eval").body
        call = parsed if isinstance(parsed, ast.Call) else ast.Call(parsed, [], [])
        settings = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        return kinds[call.func.id](*map(ast.literal_eval, call.args), **settings)  # type: ignore[attr-defined]
    except (SyntaxError, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, GradRouteError):
            raise
        raise GradRouteError(
            f"`estimator` should be an Estimator or one of {', '.join(kinds)}. Found {estimator!r}."
        ) from error


def estimator_of(text: str) -> Estimator | None:
    """The estimator that a provenance names; None for one of the user's own, or with `orthogonal_to`."""
    try:
        return as_estimator(text)
    except GradRouteError:
        return None
