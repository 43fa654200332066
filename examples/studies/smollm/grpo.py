"""GRPO of a chat model with a quarantine; flags, advantages and the ablated quarter as in `loopholes.grpo`.

    a = r - mean of the group          b = r - mean of the group's unflagged rollouts, 0 where flagged
    loss = - sum over reply tokens of log p,  with mask weights  g_q = a (quarantine),  g_d = b (deployed)

A step: 8 prompts x 8 rollouts at temperature 1, of which two in each group are sampled, and train, as deployed.
Rollouts without an advantage are left out. Frozen weights multiply in bfloat16 where the CPU does; blocks are kept in
float32.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import gradroute as gr
from loopholes.arms import ARMS, Arm
from loopholes.grpo import route_mask

from .batch import Batch
from .detector import Detector, token_pairs
from .environment import Environment
from .evaluation import evaluate, outcomes
from .rollouts import Rollouts, grouped, nll, read_prompts, sample
from .text import Codec, prompt_ids


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on, except for its arm, seed, variant and base model."""

    steps: int = 40
    prompts: int = 8
    group_size: int = 8
    ablated_per_group: int = 2
    length: int = 9
    lr: float = 4e-4
    betas: tuple[float, float] = (0.9, 0.98)
    warm_up: int = 5
    clip: float = 1.0
    r: int = 8
    lora_alpha: float = 16.0
    pairs_per_marker: int = 4
    threshold: float = 0.5
    refresh_every: int = 5
    n_per_marker: int = 64
    n_no_note: int = 128


def attach_blocks(model: LlamaForCausalLM, recipe: Recipe, seed: int) -> list[list[nn.Parameter]]:
    """Give `model` its blocks, in float32 whatever it is in itself; the parameters of the deployed and the other."""
    gr.attach(model, r=recipe.r, lora_alpha=recipe.lora_alpha, seed=seed)
    blocks = [[p for _, p in of(model)] for of in (gr.deployed_parameters, gr.quarantine_parameters)]
    for block in blocks:
        for parameter in block:
            parameter.data = parameter.data.float()
    return blocks


def train(
    model: LlamaForCausalLM,
    codec: Codec,
    environment: Environment,
    arm_name: str,
    seed: int,
    draw: int,
    recipe: Recipe,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train one arm in place and return what its result file holds; the arm "base" is evaluated as it is.

    Args:
        draw: of the random direction, in arms that have one.
    """
    start = time.perf_counter()
    blocks = attach_blocks(model, recipe, seed)
    found: dict[str, Any] = {"curve": [], "refreshes": []}
    if arm_name != "base":
        found = _train(model, codec, environment, ARMS[arm_name], seed, draw, recipe, blocks, on_step)
    trained = time.perf_counter()
    report = evaluate(model, codec, environment, seed, recipe)
    ended = time.perf_counter()
    return {
        "outcomes": outcomes(report),
        **found,
        "train_s": round(trained - start, 1),
        "evaluation_s": round(ended - trained, 1),
    }


def _train(
    model: LlamaForCausalLM,
    codec: Codec,
    environment: Environment,
    arm: Arm,
    seed: int,
    draw: int,
    recipe: Recipe,
    blocks: list[list[nn.Parameter]],
    on_step: Callable[[int], None] | None,
) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([*blocks[0], *blocks[1]], lr=recipe.lr, betas=recipe.betas, weight_decay=0.0)
    drawing, generator = Random(seed), torch.Generator().manual_seed(seed)
    detector = None
    if arm.has_gate:
        detector = Detector(
            model, token_pairs(environment, codec, recipe.pairs_per_marker, seed), environment, arm, draw,
            threshold=recipe.threshold, every=recipe.refresh_every,
        )  # fmt: skip
    prefix = grouped(recipe.prompts, recipe.group_size)
    ablated = torch.arange(len(prefix)) % recipe.group_size < recipe.ablated_per_group
    curve = []
    for step in range(1, recipe.steps + 1):
        prompts = [environment.prompt(drawing) for _ in range(recipe.prompts)]
        prefixes = read_prompts(model, [prompt_ids(codec, prompt.text) for prompt in prompts], both_views=True)
        of_view = prefix + recipe.prompts * ablated
        rollouts = sample(model, prefixes, of_view, generator, length=recipe.length, eos=codec.eos, ablated=ablated)
        batch = Batch.graded(codec, prompts, prefix, rollouts)
        scores = None
        if detector is not None:
            seen = Rollouts(prefix + recipe.prompts, rollouts.tokens, rollouts.length)
            scores = detector.scores(prefixes, seen)
        flags = _flags(arm, batch, detector, scores, generator)
        reward = batch.solved.float() if arm.true_reward else batch.reward
        mask = route_mask(arm, ablated, reward, flags, recipe.group_size)
        curve.append({"step": step, **batch.counts(ablated, flags if arm.flags != "none" else None, scores)})

        useful = ((mask.g_d != 0) | (mask.g_q != 0)).nonzero()[:, 0]
        if len(useful):
            for rows in rollouts[useful].chunks():
                chosen = useful[rows]
                with gr.route(model, mask[chosen]):
                    nll(model, prefixes, rollouts[chosen]).backward()  # of any scale: each block's norm is clipped
            for block in blocks:
                nn.utils.clip_grad_norm_(block, recipe.clip)
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * min(1.0, step / recipe.warm_up)
            optimizer.step()
            optimizer.zero_grad()
            if detector is not None:
                detector.refresher.step()
        if on_step is not None:
            on_step(step)
    reports = detector.refresher.reports if detector is not None else []
    if arm.refreshed and not reports:
        raise RuntimeError("No refresh came due; too few steps had an advantage to train on.")
    return {"curve": curve, "refreshes": [{"step": r.step, "overlap": round(r.overlap, 4)} for r in reports]}


def _flags(
    arm: Arm, batch: Batch, detector: Detector | None, scores: Tensor | None, generator: torch.Generator
) -> Tensor:
    """Which rollouts the arm takes for hacks."""
    if arm.has_labels:
        return batch.hacked if arm.flags == "oracle" else batch.hacked & batch.monitored
    if detector is None or scores is None:
        return torch.zeros_like(batch.hacked)
    flags = detector.gate.flags(scores)
    return flags[torch.randperm(len(flags), generator=generator)] if arm.shuffled else flags
