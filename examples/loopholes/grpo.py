"""GRPO with a quarantine, written against gradroute's public API only.

    a = r - mean of the group          b = r - mean of the group's unflagged rollouts, 0 where flagged
    loss = - sum over completion tokens of log p,  with mask weights  g_q = a (quarantine),  g_d = b (deployed)

Gates weigh parameter gradients and leave the forward alone, so one backward of plain log-probabilities gives each block
the policy gradient of its own advantage. Some rollouts of each group are sampled with the quarantine ablated, and train
the deployed block only: it has to find answers by itself.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import gradroute as gr
import torch
from einops import rearrange, repeat
from torch import Generator, Tensor, nn

from .arms import ARMS, Arm
from .environment import MODES, MONITORED, Environment, Grade, grade, hint_modes
from .sampling import captured, completion_logps, sample


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on besides its arm, seed and base model."""

    steps: int = 150
    prompts: int = 16
    group_size: int = 8
    ablated_per_group: int = 2
    no_hint: float = 0.2
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    r: int = 4
    lora_alpha: float = 8.0
    pairs_per_mode: int = 8
    threshold: float = 0.5
    refresh_every: int = 5
    curve_every: int = 10
    curve_n_per_mode: int = 64
    n_per_mode: int = 256


class Detector:
    """Directions from pairs of the monitored modes, the gate on them, and their refresh."""

    def __init__(self, model: nn.Module, environment: Environment, arm: Arm, recipe: Recipe, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        triples = environment.contrastive_pairs(MONITORED, recipe.pairs_per_mode, generator)
        pairs = [gr.ContrastivePair(*triple) for triple in triples]

        def extract() -> gr.Directions:
            return gr.extract_activation_directions(model, pairs)

        self.model, self.directions = model, extract()
        if arm.random_direction:
            self.directions = self.directions.random_like(seed)
        self.gate = gr.BandGate.calibrate(self.directions, threshold=recipe.threshold)
        self.refresher = None
        if arm.refreshed:
            self.refresher = gr.Refresher(self.directions, extract, model=model, every=recipe.refresh_every)

    def flags(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """Which rollouts look like hacks."""
        return self.gate.flags(self.directions.score(captured(self.model, prompts, completions)))


def flag(arm: Arm, detector: Detector | None, prompts: Tensor, completions: Tensor, graded: Grade, generator: Generator) -> Tensor:
    """(n,) booleans: the rollouts that this arm takes for hacks."""
    if arm.flags == "oracle":
        return graded.hacked
    if arm.flags == "monitored":
        return graded.hacked & (hint_modes(prompts) < len(MONITORED))
    if detector is None:
        return torch.zeros(len(prompts), dtype=torch.bool)
    flags = detector.flags(prompts, completions)
    return flags[torch.randperm(len(flags), generator=generator)] if arm.flags == "permuted" else flags


def train(
    model: nn.Module,
    environment: Environment,
    arm_name: str,
    seed: int,
    recipe: Recipe,
    on_step: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Train one arm in place and return its entry of `results.json` (without the base seed)."""
    start, arm = time.perf_counter(), ARMS[arm_name]
    gr.attach(model, r=recipe.r, lora_alpha=recipe.lora_alpha, seed=seed)
    blocks = [[p for _, p in gr.deployed_parameters(model)], [p for _, p in gr.quarantine_parameters(model)]]
    optimizer = torch.optim.AdamW(sum(blocks, []), lr=recipe.lr, betas=recipe.betas, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    detector = Detector(model, environment, arm, recipe, seed) if arm.has_directions else None
    ablated = rearrange(
        torch.arange(recipe.group_size).expand(recipe.prompts, -1) < recipe.ablated_per_group, "p g -> (p g)"
    )
    curve = [curve_point(model, environment, recipe, seed, step=0)]

    for step in range(1, recipe.steps + 1):
        prompts, _ = environment.sample_prompts(recipe.prompts, generator, no_hint=recipe.no_hint)
        prompts = repeat(prompts, "p t -> (p g) t", g=recipe.group_size)
        with gr.ablate_quarantine(model, rows=ablated):
            completions = sample(model, prompts, generator)
        graded = grade(prompts, completions)
        reward = graded.solved.float() if arm.true_reward else graded.reward
        flags = flag(arm, detector, prompts, completions, graded, generator)
        a, b = gr.clean_baseline_advantages(reward, flags, recipe.group_size)
        if arm.routed:
            mask = gr.RouteMask.weights(m=(~ablated).float(), g_d=b, g_q=a * ~ablated)
        else:
            mask = gr.RouteMask.weights(m=0.0, g_d=a, g_q=0.0)

        useful = a != 0
        if useful.any():
            with gr.route(model, mask[useful]):
                logps = completion_logps(model, prompts[useful], completions[useful])
                (-logps.sum() / len(prompts)).backward()
            for block in blocks:
                nn.utils.clip_grad_norm_(block, recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            if detector is not None and detector.refresher is not None:
                detector.refresher.step()
        if step % recipe.curve_every == 0 or step == recipe.steps:
            point = curve_point(model, environment, recipe, seed, step)
            curve.append(point | detection(flags, graded, prompts))
        on_step(step)

    if detector is not None and detector.refresher is not None and not detector.refresher.reports:
        raise RuntimeError(f"{arm_name}: refreshed every {recipe.refresh_every} steps, but no refresh came due.")
    report = evaluate(model, environment, recipe.n_per_mode, seed)
    return {
        "arm": arm_name,
        "seed": seed,
        "env": environment.name,
        "wall_s": round(time.perf_counter() - start, 2),
        "n_per_mode": recipe.n_per_mode,
        "on": view_rates(report.on),
        "ablated": view_rates(report.ablated),
        "curve": curve,
        "refreshes": [] if detector is None or detector.refresher is None else [asdict(r) for r in detector.refresher.reports],
    }


def evaluate(model: nn.Module, environment: Environment, n_per_mode: int, seed: int) -> gr.OnOffReport:
    """`n_per_mode` rollouts of each mode and as many without a hint, on and ablated, always on the same prompts."""

    def records(model: nn.Module) -> list[gr.EvalRecord]:
        # Training draws from `seed` itself; this stream is another one.
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1))
        hinted = [environment.sample_prompts(n_per_mode, generator, no_hint=0.0, mode=mode)[0] for mode in MODES]
        unhinted, _ = environment.sample_prompts(n_per_mode, generator, no_hint=1.0)
        prompts = torch.cat([*hinted, unhinted])
        graded = grade(prompts, sample(model, prompts, generator))
        modes = [MODES[i] if i >= 0 else None for i in hint_modes(prompts).tolist()]
        return [
            gr.EvalRecord(mode or "no loophole", None if mode is None else mode in MONITORED, row, hacked, solved)
            for row, (mode, hacked, solved) in enumerate(
                zip(modes, graded.hacked.tolist(), graded.solved.tolist(), strict=True)
            )
        ]

    return gr.evaluate_on_off(model, records)


def view_rates(view: Any) -> dict[str, Any]:
    """One view of an `OnOffReport` in the form of `results.json`."""
    hinted = [view.solve[mode] for mode in MODES]
    return {
        "hack_monitored": view.hack["monitored"].value,
        "hack_held_out": view.hack["held-out"].value,
        "solve_hinted": sum(rate.k for rate in hinted) / sum(rate.n for rate in hinted),
        "solve_no_hint": view.solve["no loophole"].value,
        "per_mode": {mode: {"hack": view.hack[mode].value, "solve": view.solve[mode].value} for mode in MODES},
    }


def curve_point(model: nn.Module, environment: Environment, recipe: Recipe, seed: int, step: int) -> dict[str, Any]:
    """A small evaluation during training."""
    report = evaluate(model, environment, recipe.curve_n_per_mode, seed)
    return {"step": step, "on": view_rates(report.on), "ablated": view_rates(report.ablated)}


def detection(flags: Tensor, graded: Grade, prompts: Tensor) -> dict[str, Any]:
    """Of this step's rollouts: share flagged, and share of hacks (monitored, held out) and of the rest that is flagged."""
    modes = hint_modes(prompts)
    groups = {
        "recall_monitored": graded.hacked & (modes < len(MONITORED)),
        "recall_held_out": graded.hacked & (modes >= len(MONITORED)),
        "false_positive_rate": ~graded.hacked,
    }
    shares = {name: flags[rows].float().mean().item() if rows.any() else None for name, rows in groups.items()}
    return {"flagged": flags.float().mean().item(), **shares}
