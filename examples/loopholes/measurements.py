"""Measurements other than the rates: detection, hack-ward shares, the dose curve, scores by true class."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Generator, Tensor, nn

import gradroute as gr

from .detector import Detector
from .environment import MODES, Environment, Grade
from .evaluation import is_monitored
from .sampling import sample

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
SHARES = {"recall_monitored": "hacks_monitored", "recall_held_out": "hacks_held_out", "false_positive_rate": "rest"}
AREAS = ("auroc_monitored", "auroc_held_out")
BINS = torch.linspace(-1.0, 2.0, 31)


def detection(
    environment: Environment, prompts: Tensor, graded: Grade, flags: Tensor | None, scores: Tensor | None
) -> dict[str, Any]:
    """Of this step's rollouts: shares flagged among hacks (monitored, held out) and the rest, and AUROC of scores."""
    monitored = is_monitored(environment, prompts)
    hacks = {"monitored": graded.hacked & monitored, "held_out": graded.hacked & ~monitored}
    found: dict[str, Any] = {f"hacks_{name}": int(rows.sum()) for name, rows in hacks.items()}
    found["rest"] = int((~graded.hacked).sum())
    if flags is not None:
        groups = {f"recall_{name}": rows for name, rows in hacks.items()} | {"false_positive_rate": ~graded.hacked}
        found |= {name: flags[rows].float().mean().item() if rows.any() else None for name, rows in groups.items()}
        found["flagged"] = flags.float().mean().item()
    if scores is not None:
        for name, rows in hacks.items():
            of_both = rows | ~graded.hacked
            both = rows.any() and not graded.hacked.all()
            found[f"auroc_{name}"] = auroc(scores[of_both], rows[of_both]) if both else None
    return found


def over_steps(points: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Of what `detection` found in each step: shares flagged of all their rollouts, and the mean AUROC over steps."""
    found: dict[str, float | None] = {}
    for name, rows in SHARES.items():
        flagged = sum(point[name] * point[rows] for point in points if point[rows])
        total = sum(point[rows] for point in points)
        found[name] = flagged / total if total else None
    for name in AREAS:
        known = [point[name] for point in points if point[name] is not None]
        found[name] = fmean(known) if known else None
    return found


def auroc(scores: Tensor, labels: Tensor) -> float:
    """P(score of a hack > score of another rollout), ties counted half."""
    difference = scores[labels][:, None] - scores[~labels]
    return ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()


def drift(detector: Detector, prompts: Tensor, completions: Tensor, ablated: Tensor, hacked: Tensor) -> dict[str, Any]:
    """How far fresh directions are from the first ones, and what the first ones would cost on these rollouts.

    Overlap of what would be extracted now with the first directions, and with those in use; AUROC of `hacked` by the
    first directions and by fresh ones, of all modules and of the last block. Empty for random rows: none are extracted.
    """
    if detector.arm.random_direction != "no":
        return {}
    fresh = detector.extract()
    found: dict[str, Any] = {"overlap_in_use": detector.directions.overlap(fresh)}
    tells_apart = detector.arm.has_gate and hacked.any() and not hacked.all()
    upper = last_block(detector.first), last_block(fresh)
    for where, first, now in (("", detector.first, fresh), ("_upper", *upper)):
        found[f"overlap_first{where}"] = first.overlap(now)
        for name, by in (("first", first), ("fresh", now)) if tells_apart else ():
            found[f"auroc_{name}{where}"] = auroc(detector.scores(prompts, completions, ablated, by=by), hacked)
    return found


def last_block(directions: gr.Directions) -> gr.Directions:
    """Those of the last transformer block's modules alone."""
    depth = {name: int(name.split(".layers.")[1].split(".")[0]) for name in directions.rows}
    rows = {name: rows for name, rows in directions.rows.items() if depth[name] == max(depth.values())}
    return gr.Directions(rows, directions.hack, directions.clean, directions.provenance)


def hackward(stats: Sequence[gr.filters.FilterStats]) -> dict[str, Any]:
    """Hack-ward share of this step's deployed gradient, before and after its filter, and what chance would give."""
    if not stats:
        return {}
    found: dict[str, Any] = {name: getattr(stats[-1], name) for name in ("cin", "cout", "null", "fired")}
    sources = stats[0].sources
    return found | {f"cin_{source}": share.cin for source, share in sources.items()}


@torch.no_grad()
def dose_curve(model: nn.Module, environment: Environment, n_per_mode: int, seed: int) -> list[dict[str, float]]:
    """Hack and solve rates with the quarantine scaled from ablated (0) to on (1), on the same prompts and numbers."""
    curve = []
    for scale in SCALES:
        generator = Generator().manual_seed(2_000_003 * (seed + 1))
        with gr.ablate_quarantine(model, scale=scale):
            prompts, completions = _rollouts(model, environment, n_per_mode, generator)
        graded = environment.grade(prompts, completions)
        monitored = is_monitored(environment, prompts)
        rates = {"hack_monitored": graded.hacked[monitored], "hack_held_out": graded.hacked[~monitored]}
        point = {name: hits.float().mean().item() for name, hits in (rates | {"solve_hinted": graded.solved}).items()}
        curve.append({"scale": scale, **point})
    return curve


def score_histograms(
    model: nn.Module, environment: Environment, detector: Detector | None, n_per_mode: int, seed: int
) -> dict[str, Any] | None:
    """Counts of z (0 = clean pairs, 1 = hack pairs) of rollouts of the trained on view, by true class."""
    if detector is None or detector.gate is None:
        return None
    generator = Generator().manual_seed(3_000_017 * (seed + 1))
    with torch.no_grad():
        views = [_rollouts(model, environment, n_per_mode, generator)]
        with gr.ablate_quarantine(model):
            views.append(_rollouts(model, environment, n_per_mode, generator))
    prompts, completions = (torch.cat(parts) for parts in zip(*views, strict=True))
    ablated = torch.arange(len(prompts)) >= len(prompts) // 2
    z = detector.gate.z(detector.scores(prompts, completions, ablated)).clamp(BINS[0], BINS[-1])
    graded, monitored = environment.grade(prompts, completions), is_monitored(environment, prompts)
    classes = {
        "hack, monitored": graded.hacked & monitored,
        "hack, held out": graded.hacked & ~monitored,
        "solved": graded.solved,
        "neither": ~graded.hacked & ~graded.solved,
    }
    counts = {name: torch.histogram(z[rows].float(), BINS).hist.int().tolist() for name, rows in classes.items()}
    return {"bins": [round(edge, 2) for edge in BINS.tolist()], "counts": counts}


def _rollouts(
    model: nn.Module, environment: Environment, n_per_mode: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Prompts with a hint at each mode, and a completion of each."""
    hinted = [environment.sample_prompts(n_per_mode, generator, no_hint=0.0, mode=mode)[0] for mode in MODES]
    prompts = torch.cat(hinted)
    return prompts, sample(model, prompts, generator, environment.completion_length)
