"""How good directions are, told from their own pairs, or from a few labelled rollouts.

    AUROC        P(score of a hack side > score of a clean side), ties 1/2
    effect size  (mean hack - mean clean) / pooled standard deviation                                   (Cohen's d)
    split half   cosine of the estimates from two random halves of the pairs; k > 1: mean cosine of principal angles
    share        sqrt(mean over pairs |relu(V D)|^2 / |D|^2), what of a pair's difference points along the rows;
                 random orthonormal rows have sqrt(k / 2 d) (two-sided: sqrt(k / d)), in the mean square
    spectrum     singular values of D

Measured on the pairs that were held out, where there are any; D in the coordinates of the scores. Source: cin and its
null, grpo_proj2; interval of the AUROC, Newcombe 2006, Statistics in Medicine 25:559, method 5.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradroute._logging import warn
from gradroute._tables import aligned_table
from gradroute.directions.controls import haar_rows
from gradroute.directions.estimators.base import Estimate, Estimator, Features, unit
from gradroute.errors import GradRouteError

_SPLITS = 10


@dataclass(frozen=True, eq=False)
class ModuleDiagnostics:
    """Diagnostics of the directions of one module; formulas above.

    Args:
        k, d_feature: number and width of the rows.
        auroc, effect_size: of this module's part of the score.
        split_half: mean over random halves; None where there are too few pairs, or no estimator to repeat.
        share, null, random: share along the rows; its analytic null; the 95th percentile of random draws.
        spectrum: singular values of the paired differences, largest first.
        angles: principal angles to the predecessor in radians; None if there is none.
    """

    k: int
    d_feature: int
    auroc: float
    effect_size: float
    split_half: float | None
    share: float
    null: float
    random: float
    spectrum: Float[Tensor, " n"]
    angles: Float[Tensor, " k"] | None = None


@dataclass(frozen=True, eq=False)
class DirectionsSummary:
    """A readable table of diagnostics per module and pooled; `print` it.

    Args:
        title: what the directions are.
        measured_on: which pairs.
        modules: by name.
        auroc, interval, effect_size: of the whole score; the interval covers 95 %.
    """

    title: str
    measured_on: str
    modules: Mapping[str, ModuleDiagnostics]
    auroc: float
    interval: tuple[float, float]
    effect_size: float

    def __repr__(self) -> str:
        head = ("module", "k x d", "AUROC", "effect", "halves", "share", "null", "random 95%", "S0^2", "angle")
        table = aligned_table([head, *(_row(name, m) for name, m in self.modules.items())], numbers=True)
        low, high = self.interval
        pooled = f"all modules: AUROC {self.auroc:.3f} [{low:.3f}, {high:.3f}], effect {self.effect_size:.2f}"
        return "\n".join([self.title, f"measured on {self.measured_on}", table, pooled])


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


def validate_scores(scores: Float[Tensor, " rows"], labels: Bool[Tensor, " rows"]) -> Validation:
    """`Validation` of scores, with a `GradRouteWarning` if they are inverted.

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
        raise GradRouteError(
            f"`labels` should hold rollouts of both kinds. Found {len(hack)} hacks and {len(clean)} others."
        )
    value = auroc(hack, clean)
    found = Validation(value, *auroc_interval(value, len(hack), len(clean)), len(hack), len(clean))
    if found.inverted:
        warn(
            f"The scores are inverted on the labelled rollouts: AUROC {value:.2f} [{found.low:.2f}, {found.high:.2f}]. "
            "Gates would route the clean ones. Fix: take pairs from the distribution of the rollouts.",
        )
    return found


def summarise(
    estimate: Estimate, hack: Features, clean: Features, estimator: Estimator | None, *, seed: int, draws: int
) -> DirectionsSummary:
    """Diagnostics of every module, and of the whole score.

    Args:
        estimate: the directions.
        hack, clean: raw features of the sides they were estimated from, held-out pairs included.
        estimator: repeated on halves; None leaves the split-half cosine out.
        seed: of the halves and of the random draws.
        draws: number of random draws.
    """
    if draws < 1:
        raise GradRouteError(f"`draws` should be a positive integer. Found {draws}.")
    generator = torch.Generator().manual_seed(seed)
    halves = {} if estimator is None else split_half_cosines(estimate, hack, clean, estimator, generator)
    pairs = len(next(iter(hack.values())))
    measured = list(estimate.heldout) or list(range(pairs))
    modules = {}
    totals = [torch.zeros(len(measured), dtype=torch.float64) for _ in range(2)]
    for name, rows in estimate.rows.items():
        V, (k, d) = rows.double().cpu(), rows.shape
        z = [estimate.coordinates(name, side[name][measured]).double().cpu() for side in (hack, clean)]
        scores = [side @ V.sum(0) for side in z]
        totals = [total + part for total, part in zip(totals, scores, strict=True)]
        D = z[0] - z[1]
        shares = [share(haar_rows(k, d, generator), D) for _ in range(draws)]
        modules[name] = ModuleDiagnostics(
            k, d, auroc(*scores), effect_size(*scores), halves.get(name), share(V, D),
            math.sqrt(k / (2 * d)), float(torch.tensor(shares).quantile(0.95)), torch.linalg.svdvals(D),
        )  # fmt: skip
    value = auroc(*totals)
    interval = auroc_interval(value, len(measured), len(measured))
    measured_on = f"{len(measured)} held-out pairs" if estimate.heldout else f"{pairs} pairs, in sample"
    return DirectionsSummary("", measured_on, modules, value, interval, effect_size(*totals))


def split_half_cosines(
    estimate: Estimate, hack: Features, clean: Features, estimator: Estimator, generator: torch.Generator
) -> dict[str, float]:
    """Module -> mean cosine of the estimates from two halves of the pairs that are not held out; {} if too few."""
    kept = [i for i in range(len(next(iter(hack.values())))) if i not in estimate.heldout]
    half = len(kept) // 2
    if half < estimator.least_pairs:
        return {}
    cosines: dict[str, list[float]] = {name: [] for name in estimate.rows}
    for _ in range(_SPLITS):
        order = torch.randperm(len(kept), generator=generator).tolist()
        parts = [[kept[i] for i in order[:half]], [kept[i] for i in order[half : 2 * half]]]
        a, b = (
            estimator.estimate({n: f[part] for n, f in hack.items()}, {n: f[part] for n, f in clean.items()})[0]
            for part in parts
        )
        for name, values in cosines.items():
            if name in a and name in b and a[name].any() and b[name].any():
                values.append(_cosine(unit(a[name]), unit(b[name])))
    return {name: sum(values) / len(values) for name, values in cosines.items() if values}


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


def effect_size(hack: Float[Tensor, " n"], clean: Float[Tensor, " n"]) -> float:
    """Cohen's d: (mean hack - mean clean) / sqrt((var hack + var clean) / 2); nan for one pair, inf without spread."""
    variance = (hack.var() + clean.var()) / 2 if len(hack) > 1 else torch.tensor(math.nan)
    return ((hack.mean() - clean.mean()) / variance.sqrt()).item()


def principal_angles(V: Float[Tensor, "k d"], W: Float[Tensor, "l d"]) -> Float[Tensor, " n"]:
    """arccos of the singular values of Q_V^T Q_W, smallest first; min(k, l) angles between 0 and pi / 2."""
    Q_V, Q_W = (torch.linalg.qr(rows.double().cpu().T).Q for rows in (V, W))
    angles: Tensor = torch.linalg.svdvals(Q_V.T @ Q_W).clamp(max=1).arccos()
    return angles


def overlap(V: Float[Tensor, "_ d"] | None, W: Float[Tensor, "_ d"] | None) -> float:
    """Sum over rows of <v_i, w_i> over the larger number of rows; rows that only one side has overlap with nothing."""
    if V is None or W is None:
        return 0.0
    shared = min(len(V), len(W))
    return (unit(V[:shared]) * unit(W[:shared].to(V))).sum().item() / max(len(V), len(W))


def _cosine(V: Float[Tensor, "k d"], W: Float[Tensor, "l d"]) -> float:
    if len(V) == len(W) == 1:
        return float((V.double() @ W.double().T).item())
    return principal_angles(V, W).cos().mean().item()


def share(V: Float[Tensor, "k d"], D: Float[Tensor, "pairs d"]) -> float:
    """sqrt(mean over pairs |relu(V D)|^2 / |D|^2), of the pairs that differ."""
    D = D[D.any(1)]
    return ((D @ V.T).relu().square().sum(1) / D.square().sum(1)).mean().sqrt().item()


def _row(name: str, m: ModuleDiagnostics) -> tuple[str, ...]:
    numbers = (m.auroc, m.effect_size, m.split_half, m.share, m.null, m.random,
               (m.spectrum[0].square() / m.spectrum.square().sum()).item(),
               None if m.angles is None else m.angles.max().item())  # fmt: skip
    return (name, f"{m.k} x {m.d_feature}", *("-" if x is None else f"{x:.2f}" for x in numbers))
