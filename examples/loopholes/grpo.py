"""GRPO with a quarantine, written against gradroute's public API only.

    loss = - sum over completion tokens of log p,  with an advantage per block as mask weights (`masks`)

Gates weigh parameter gradients and leave the forward alone, so one backward of plain log-probabilities gives each block
the policy gradient of its own advantage. Arms with a filter let it decide after backward instead: on whole rollouts, or
on the gradient's part along the directions. Some rollouts of each group are sampled with the quarantine ablated, and
train the deployed block only: it has to find answers by itself.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from einops import repeat
from torch import nn

import gradroute as gr

from .arm import Arm
from .arms import ARMS
from .cost import Meter
from .detector import Detector, ScoreView
from .environment import Environment
from .evaluation import curve_point, evaluate, view_rates
from .flags import Flagger
from .forwards import changed_forwards
from .inoculation import inoculated, lesson
from .masks import route_mask
from .measurements import detection, dose_curve, drift, hackward, score_histograms
from .post_hoc import remove_components
from .sampling import completion_logps, sample
from .teacher import Teacher


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on, except for its arm, seed and base model."""

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
    score_view: ScoreView = "ablated"
    explained_nats: float = 1.0
    slow_share: float = 0.5
    slow_fraction: float = 0.25
    penalty: float = 3.0
    inoculation_steps: int = 20
    grade: float = 1.0
    over_routing: float = 2.0
    kept_directions: int = 4
    prompt_steps: int = 40
    steering: float = 2.0
    ablated_directions: int = 8
    removed_components: int = 2
    refresh_every: int = 5
    recall: float = 1.0
    false_positive_rate: float = 0.0
    teacher_per_group: int = 0
    teacher_steps: int = 0
    curve_every: int = 10
    curve_n_per_mode: int = 64
    n_per_mode: int = 256

    @property
    def slow_steps(self) -> int:
        """Steps of a slow start, after which rollouts are sampled ablated in arms that do so late."""
        return round(self.slow_share * self.steps)

    def penalty_of(self, arm: Arm) -> float:
        """What a flagged rollout loses: enough to make a hack a loss on average, where labels miss most of them."""
        if arm.penalty is not None:
            return arm.penalty
        return max(self.penalty, 1 / self.recall) if self.recall else self.penalty


def attached(model: nn.Module, arm: Arm, recipe: Recipe, seed: int) -> tuple[list[list[nn.Parameter]], float]:
    """Give `model` the arm's blocks; the parameters of both, and the learning rate that goes with them."""
    if arm.parametrization == "svd_gain":
        r, lora_alpha, lr = recipe.gain_r, recipe.gain_alpha, recipe.gain_lr
    else:
        r, lora_alpha, lr = recipe.r, recipe.lora_alpha, recipe.lr
    gr.attach(model, r=r, lora_alpha=lora_alpha, seed=seed, parametrization=arm.parametrization)
    return [[p for _, p in gr.deployed_parameters(model)], [p for _, p in gr.quarantine_parameters(model)]], lr


def make_detector(model: nn.Module, environment: Environment, arm: Arm, recipe: Recipe, seed: int) -> Detector | None:
    """The detector of an arm that reads directions."""
    if arm.directions == "none":
        return None
    return Detector(
        model,
        environment,
        arm,
        seed,
        pairs_per_mode=recipe.pairs_per_mode,
        threshold=recipe.threshold if arm.has_gate else recipe.filter_threshold,
        refresh_every=recipe.refresh_every,
        score_view=recipe.score_view,
        kept_directions=recipe.kept_directions,
    )


def train(
    model: nn.Module,
    environment: Environment,
    arm_name: str,
    seed: int,
    recipe: Recipe,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train one arm in place and return its entry of `results.json` (without the base seed)."""
    arm = ARMS[arm_name]
    blocks, lr = attached(model, arm, recipe, seed)
    with Meter(model).open() as meter:
        if arm.inoculated == "no":
            return _train(model, environment, arm_name, seed, recipe, blocks, lr, on_step, meter)
        taught = lesson(environment, arm.inoculated, recipe.pairs_per_mode, seed)
        with inoculated(model, *taught, steps=recipe.inoculation_steps, lr=lr) as gained:
            entry = _train(model, environment, arm_name, seed, recipe, blocks, lr, on_step, meter)
    entry["curve"][0]["gained_nats"] = gained
    return entry


def _train(
    model: nn.Module,
    environment: Environment,
    arm_name: str,
    seed: int,
    recipe: Recipe,
    blocks: list[list[nn.Parameter]],
    lr: float,
    on_step: Callable[[int], None] | None,
    meter: Meter,
) -> dict[str, Any]:
    start, arm = time.perf_counter(), ARMS[arm_name]
    optimizer = torch.optim.AdamW(gr.optim.block_groups(model), lr=lr, betas=recipe.betas, weight_decay=0.0)
    if arm.slow_start:
        gr.optim.slow_start(model, optimizer, steps=recipe.slow_steps, fraction=recipe.slow_fraction)
    generator = torch.Generator().manual_seed(seed)
    detector = make_detector(model, environment, arm, recipe, seed)
    flagger = Flagger(model, arm, environment, detector, recipe, seed)
    forwards = changed_forwards(model, environment, arm, recipe, seed)
    teacher = Teacher(environment, recipe.group_size, recipe.teacher_per_group, recipe.teacher_steps, seed)
    place = repeat(torch.arange(recipe.group_size), "g -> (p g)", p=recipe.prompts)
    first_ablated = {"always": 1, "late": recipe.slow_steps + 1, "no": math.inf}[arm.ablated_rollouts]
    stats: list[gr.filters.FilterStats] = []
    gate: list[dict[str, Any]] = []
    with meter.paused():
        curve = [curve_point(model, environment, recipe.curve_n_per_mode, seed, step=0)]
    if forwards.gained_nats is not None:
        curve[0]["gained_nats"] = forwards.gained_nats

    for step in range(1, recipe.steps + 1 if arm_name != "base" else 1):
        prompts, _ = environment.sample_prompts(recipe.prompts, generator, no_hint=recipe.no_hint)
        prompts = repeat(prompts, "p t -> (p g) t", g=recipe.group_size)
        ablated = place < (recipe.ablated_per_group if step >= first_ablated else 0)
        with gr.ablate_quarantine(model, rows=ablated), forwards.sampling():
            completions = sample(model, prompts, generator, environment.completion_length)
        completions, sources = teacher.mix(step, prompts, completions)
        graded = environment.grade(prompts, completions)
        reward = graded.solved.float() if arm.true_reward else graded.reward
        flags = flagger(prompts, completions, graded, generator, ablated)
        scores = flagger.scores
        if scores is not None:
            gate.append({"step": step, **detection(environment, prompts, graded, flags, scores)})
        mask = route_mask(
            arm, ablated, reward, flags, recipe.group_size, recipe.penalty_of(arm),
            z=flagger.z, grade=recipe.grade, over_routing=recipe.over_routing,
        )  # fmt: skip
        useful = (mask.g_d != 0) | (mask.g_q != 0)
        mask = flagger.by_token(mask)

        if useful.any():
            labels = None if sources is None else [sources[row] for row in useful.nonzero().squeeze(1).tolist()]
            with detector.filtering(labels) if detector else nullcontext(stats) as stats, gr.route(model, mask[useful]):
                with forwards.loss():
                    logps = completion_logps(model, prompts[useful], completions[useful])
                (-logps.sum()).backward()  # of any scale: what matters is the norm that each block is clipped to
            for block in blocks:
                nn.utils.clip_grad_norm_(block, recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            if detector is not None and detector.refresher is not None:
                detector.refresher.step()
        if step % recipe.curve_every == 0 or step == recipe.steps:
            with meter.paused():
                point = curve_point(model, environment, recipe.curve_n_per_mode, seed, step)
                shown = flags if arm.has_flags else None
                if detector is not None and scores is None and arm.parametrization == "lora":
                    scores = detector.scores(prompts, completions, ablated)
                flagging = flagger.figures() | detection(environment, prompts, graded, shown, scores)
                moved = drift(detector, prompts, completions, ablated, graded.hacked) if detector is not None else {}
                curve.append(point | flagging | hackward(stats) | moved)
        if on_step is not None:
            on_step(step)

    reports = detector.refresher.reports if detector is not None and detector.refresher is not None else []
    if arm.refreshed and not reports:
        raise RuntimeError(f"{arm_name}: no refresh came due; too few steps had an advantage to train on.")
    cost = {"tokens": meter.tokens, "steps": meter.steps}
    if arm.removed != "no":
        remove_components(model, recipe.removed_components, arm.removed, seed)
    report = evaluate(model, environment, recipe.n_per_mode, seed)
    return {
        "arm": arm_name,
        "seed": seed,
        "env": environment.name,
        "monitored": list(environment.monitored),
        "wall_s": round(time.perf_counter() - start, 2),
        "n_per_mode": recipe.n_per_mode,
        "on": view_rates(report.on),
        "ablated": view_rates(report.ablated),
        "cost": cost,
        "curve": curve,
        "gate": gate,
        "dose": dose_curve(model, environment, recipe.curve_n_per_mode, seed),
        "scores": score_histograms(model, environment, detector, recipe.n_per_mode, seed),
        "refreshes": [asdict(report) for report in reports],
    }
