"""Diagnostics of directions, measured on the pairs that they come from.

    AUROC        P(score of a hack side > score of a clean side), ties 1/2
    effect size  (mean hack - mean clean) / pooled standard deviation                                   (Cohen's d)
    split half   cosine of the estimates from two random halves of the pairs; k > 1: mean cosine of principal angles
    share        sqrt(mean over pairs |relu(V D)|^2 / |D|^2), what of a pair's difference points along the rows;
                 random orthonormal rows have sqrt(k / 2 d) (two-sided: sqrt(k / d)), in the mean square
    spectrum     singular values of D

Measured on the pairs that were held out, where there are any; D in the coordinates of the scores. Source: cin and its
null, grpo_proj2. Before training, `validate` says more: it measures on rollouts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gradroute._checks import positive_integer
from gradroute._plot import new_axes
from gradroute._tables import aligned_table
from gradroute.directions._draws import haar_rows
from gradroute.directions.directions import Directions, principal_angles
from gradroute.directions.estimators.base import Estimate, Estimator, Features, unit
from gradroute.directions.validation import auroc, auroc_interval

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
    """A readable table of diagnostics per module and pooled: `print` it, or `plot` it.

    Args:
        title: `repr` of the directions.
        measured_on: the pairs, in words.
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

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the AUROC of each module and of all; returns (figure, axes). Needs matplotlib.

        Markers tell modules apart by shape, not by colour.
        """
        fig, ax = new_axes(ax, (8.5, 4.6))
        names = list(self.modules)
        low, high = self.interval
        ax.axhspan(low, high, color="0.88", label=f"pooled, 95 % interval [{low:.2f}, {high:.2f}]")
        ax.axhline(self.auroc, color="0.3", label=f"pooled AUROC {self.auroc:.2f}")
        ax.axhline(0.5, color="0", linestyle=":", label="chance")
        for marker, kind, label in (("o", True, "share above 95 % of random rows"), ("x", False, "share not above")):
            chosen = {i: m.auroc for i, m in enumerate(self.modules.values()) if (m.share > m.random) is kind}
            if chosen:
                ax.plot(list(chosen), list(chosen.values()), marker, color="0", label=label)
        step = max(1, len(names) // 24)
        shared = _shared_prefix(names)
        ax.set_xticks(
            range(len(names))[::step], [name.removeprefix(shared) for name in names[::step]], rotation=90, fontsize=8
        )
        ax.set_ylim(-0.03, 1.03)
        ax.set_ylabel(f"AUROC on {self.measured_on}", fontsize=9)
        ax.set_xlabel(f"module of {shared.rstrip('.')}" if shared else "module", fontsize=9)
        ax.set_title(self.title, fontsize=8)
        ax.legend(fontsize=8, loc="lower right")
        return fig, ax


def summary(
    directions: Directions, previous: Directions | None = None, *, seed: int = 0, draws: int = 100
) -> DirectionsSummary:
    """Diagnostics of every module and of the whole score, on the held-out pairs where there are any.

    Args:
        directions: the directions; a control is measured on its own sides.
        previous: directions to take principal angles to.
        seed: of the split halves and the random draws.
        draws: number of random draws.
    """
    positive_integer("draws", draws)
    generator = torch.Generator().manual_seed(seed)
    estimate, estimator, (hack, clean) = directions.estimate, directions.known_estimator, directions.sides
    halves = {} if estimator is None else split_half_cosines(estimate, hack, clean, estimator, generator)
    angles = {} if previous is None else directions.principal_angles(previous)
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
            k, d, auroc(*scores), effect_size(*scores), halves.get(name), share(V, D), math.sqrt(k / (2 * d)),
            float(torch.tensor(shares).quantile(0.95)), torch.linalg.svdvals(D), angles.get(name),
        )  # fmt: skip
    value = auroc(*totals)
    interval = auroc_interval(value, len(measured), len(measured))
    measured_on = f"{len(measured)} held-out pairs" if estimate.heldout else f"{pairs} pairs, in sample"
    return DirectionsSummary(repr(directions), measured_on, modules, value, interval, effect_size(*totals))


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


def effect_size(hack: Float[Tensor, " n"], clean: Float[Tensor, " n"]) -> float:
    """Cohen's d: (mean hack - mean clean) / sqrt((var hack + var clean) / 2); nan for one pair, inf without spread."""
    variance = (hack.var() + clean.var()) / 2 if len(hack) > 1 else torch.tensor(math.nan)
    return ((hack.mean() - clean.mean()) / variance.sqrt()).item()


def _cosine(V: Float[Tensor, "k d"], W: Float[Tensor, "l d"]) -> float:
    if len(V) == len(W) == 1:
        return float((V.double() @ W.double().T).item())
    return principal_angles(V.cpu(), W.cpu()).cos().mean().item()


def share(V: Float[Tensor, "k d"], D: Float[Tensor, "pairs d"]) -> float:
    """sqrt(mean over pairs |relu(V D)|^2 / |D|^2), of the pairs that differ."""
    D = D[D.any(1)]
    return ((D @ V.T).relu().square().sum(1) / D.square().sum(1)).mean().sqrt().item()


def _row(name: str, m: ModuleDiagnostics) -> tuple[str, ...]:
    numbers = (m.auroc, m.effect_size, m.split_half, m.share, m.null, m.random,
               (m.spectrum[0].square() / m.spectrum.square().sum()).item(),
               None if m.angles is None else m.angles.max().item())  # fmt: skip
    return (name, f"{m.k} x {m.d_feature}", *("-" if x is None else f"{x:.2f}" for x in numbers))


def _shared_prefix(names: Sequence[str]) -> str:
    """The beginning that all names share, up to a dot: a plot need not repeat it."""
    parts = [name.split(".")[:-1] for name in names]
    shared = 0
    while all(len(each) > shared and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    return "".join(f"{part}." for part in parts[0][:shared])
