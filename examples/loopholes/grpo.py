"""GRPO with a quarantine, written against gradroute's public API only.

    a = r - mean of the group          b = r - mean of the group's unflagged rollouts, 0 where flagged
    loss = - sum over completion tokens of log p,  with mask weights  g_q = a (quarantine),  g_d = b (deployed)

Gates weigh parameter gradients and leave the forward alone, so one backward of plain log-probabilities gives each block
the policy gradient of its own advantage. Arms with a filter let it decide after backward instead: on whole rollouts, or
on the gradient's part along the directions. Some rollouts of each group are sampled with the quarantine ablated, and
train the deployed block only: it has to find answers by itself.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Generator, Tensor, nn

import gradroute as gr

from .arms import ARMS, Arm
from .detector import Detector
from .environment import MONITORED, Environment, Grade, grade, hint_modes
from .evaluation import curve_point, detection, evaluate, hackward, view_rates
from .sampling import completion_logps, sample


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
    lora_alpha: float = 16.0
    gain_lr: float = 3e-2
    gain_r: int = 48
    gain_alpha: float = 192.0
    pairs_per_mode: int = 8
    threshold: float = 0.5
    filter_threshold: float = 0.25
    refresh_every: int = 5
    curve_every: int = 10
    curve_n_per_mode: int = 64
    n_per_mode: int = 256


def flag(
    arm: Arm, detector: Detector | None, prompts: Tensor, completions: Tensor, graded: Grade, generator: Generator
) -> Tensor:
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
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train one arm in place and return its entry of `results.json` (without the base seed)."""
    start, arm = time.perf_counter(), ARMS[arm_name]
    gains = arm.parametrization == "svd_gain"
    r, lora_alpha, lr = (
        (recipe.gain_r, recipe.gain_alpha, recipe.gain_lr) if gains else (recipe.r, recipe.lora_alpha, recipe.lr)
    )
    gr.attach(model, r=r, lora_alpha=lora_alpha, seed=seed, parametrization=arm.parametrization)
    blocks = [[p for _, p in gr.deployed_parameters(model)], [p for _, p in gr.quarantine_parameters(model)]]
    optimizer = torch.optim.AdamW([*blocks[0], *blocks[1]], lr=lr, betas=recipe.betas, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    detector = None
    if arm.directions != "none":
        detector = Detector(
            model,
            environment,
            arm,
            seed,
            pairs_per_mode=recipe.pairs_per_mode,
            threshold=recipe.threshold if arm.flags in ("gate", "permuted") else recipe.filter_threshold,
            refresh_every=recipe.refresh_every,
        )
    ablated = rearrange(
        torch.arange(recipe.group_size).expand(recipe.prompts, -1) < recipe.ablated_per_group, "p g -> (p g)"
    )
    filtered = None
    curve = [curve_point(model, environment, recipe.curve_n_per_mode, seed, step=0)]

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
            # A filter that routes gives the quarantine what it takes from the deployed block, and nothing else does.
            g_q = torch.zeros_like(a) if arm.gradient_filter == "route" else a * ~ablated
            # Over which rollouts a baseline should be taken, a filter of rollouts decides after backward only.
            g_d = reward if arm.gradient_filter == "rollouts" else b
            mask = gr.RouteMask.weights(m=(~ablated).float(), g_d=g_d, g_q=g_q)
        else:
            mask = gr.RouteMask.weights(m=0.0, g_d=a, g_q=0.0)

        useful = (mask.g_d != 0) | (mask.g_q != 0)
        if useful.any():
            with gr.route(model, mask[useful]), detector.recording() if detector else nullcontext():
                logps = completion_logps(model, prompts[useful], completions[useful])
                (-logps.sum()).backward()  # of any scale: what matters is the norm that each block is clipped to
            filtered = detector.filtered() if detector else None
            for block in blocks:
                nn.utils.clip_grad_norm_(block, recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            if detector is not None and detector.refresher is not None:
                detector.refresher.step()
        if step % recipe.curve_every == 0 or step == recipe.steps:
            point = curve_point(model, environment, recipe.curve_n_per_mode, seed, step)
            flagging = detection(flags, graded, prompts) if arm.flags != "none" else {}
            curve.append(point | flagging | hackward(filtered))
        if on_step is not None:
            on_step(step)

    reports = detector.refresher.reports if detector is not None and detector.refresher is not None else []
    if arm.refreshed and not reports:
        raise RuntimeError(f"{arm_name}: no refresh came due; too few steps had an advantage to train on.")
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
        "refreshes": [asdict(report) for report in reports],
    }
