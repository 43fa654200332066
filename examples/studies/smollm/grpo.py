"""GRPO of a chat model with a quarantine; flags, advantages and the ablated quarter as in `loopholes.grpo`.

    loss = - sum over reply tokens of log p,  with an advantage per block as mask weights (`loopholes.masks`)

A step: 8 prompts x 8 rollouts at temperature 1, of which two in each group are sampled, and train, as deployed; in arms
with a slow start of the deployed block, only once that is over. Rollouts without an advantage are left out. Frozen
weights multiply in bfloat16 where the CPU does; blocks are kept in float32.
"""

import time
from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM

import gradroute as gr
from loopholes.arm import Arm
from loopholes.arms import ARMS
from loopholes.masks import route_mask
from loopholes.post_hoc import remove_components

from .batch import Batch
from .detector import Detector, token_pairs
from .environment import Environment
from .evaluation import evaluate
from .flags import Flagger
from .recipe import Recipe
from .rollouts import grouped, nll, read_prompts, sample
from .store import ARMS as STUDIED
from .text import Codec, prompt_ids

QUANTILES = (0.1, 0.5, 0.9, 0.99)
"""Of the log ratios of a step."""


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
        arm_name: one that the study has.
        draw: of the random direction, in arms that have one.
    """
    if arm_name not in STUDIED:
        raise ValueError(f"`arm_name` should be one of {', '.join(STUDIED)}. Found {arm_name!r}.")
    start, arm = time.perf_counter(), ARMS[arm_name]
    blocks = attach_blocks(model, recipe, seed)
    found: dict[str, Any] = {"curve": [], "refreshes": []}
    if arm_name != "base":
        found = _train(model, codec, environment, arm, seed, draw, recipe, blocks, on_step)
    if arm.removed != "no":
        remove_components(model, recipe.removed_components, arm.removed, seed)
    trained = time.perf_counter()
    outcomes = evaluate(model, codec, environment, seed, recipe, one_view=not arm.routed)
    ended = time.perf_counter()
    return {
        "outcomes": outcomes,
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
    optimizer = torch.optim.AdamW(gr.optim.block_groups(model), lr=recipe.lr, betas=recipe.betas, weight_decay=0.0)
    slow = None
    if arm.slow_start:
        slow = gr.optim.slow_start(model, optimizer, steps=recipe.slow_steps, fraction=recipe.slow_fraction)
    drawing, generator = Random(seed), torch.Generator().manual_seed(seed)
    detector = None
    if arm.has_gate:
        detector = Detector(
            model, token_pairs(environment, codec, recipe.pairs_per_marker, seed), environment, arm, draw,
            threshold=recipe.threshold, every=recipe.refresh_every, score_view=recipe.score_view,
        )  # fmt: skip
    flagger = Flagger(model, arm, detector, recipe.explained_nats)
    prefix = grouped(recipe.prompts, recipe.group_size)
    place = torch.arange(len(prefix)) % recipe.group_size
    curve = []
    for step in range(1, recipe.steps + 1):
        prompts = [environment.prompt(drawing) for _ in range(recipe.prompts)]
        ids = [prompt_ids(codec, prompt.text) for prompt in prompts]
        prefixes = read_prompts(model, ids, both_views=True)
        ablated = place < (recipe.ablated_per_group if step >= recipe.first_ablated(arm) else 0)
        of_view = prefix + recipe.prompts * ablated
        rollouts = sample(model, prefixes, of_view, generator, length=recipe.length, eos=codec.eos, ablated=ablated)
        batch = Batch.graded(codec, prompts, prefix, rollouts)
        flags, scores = flagger(batch, ids, prefixes, rollouts, generator)
        reward = batch.solved.float() if arm.true_reward else batch.reward
        mask = route_mask(
            arm, ablated, reward, flags, recipe.group_size, recipe.penalty_of(arm), z=flagger.z, grade=recipe.grade
        )
        curve.append({"step": step, **batch.counts(ablated, flags if arm.has_flags else None, scores)})
        if scores is not None and detector is None:
            curve[-1]["log_ratios"] = [round(q, 3) for q in scores.quantile(torch.tensor(QUANTILES)).tolist()]

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
            if detector is not None and detector.refresher is not None:
                detector.refresher.step()
        if detector is not None:
            curve[-1] |= detector.drift(step, prefixes, rollouts, batch.hacked)
        if on_step is not None:
            on_step(step)
    reports = detector.refresher.reports if detector is not None and detector.refresher is not None else []
    if arm.refreshed and not reports:
        raise RuntimeError("No refresh came due; too few steps had an advantage to train on.")
    if slow is not None and not slow.over:
        raise RuntimeError(f"The slow start is not over: {slow}. Too few steps had an advantage to train on.")
    return {"curve": curve, "refreshes": [{"step": r.step, "overlap": round(r.overlap, 4)} for r in reports]}
