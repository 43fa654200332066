"""P1: a routed step against PEFT's LoRA. P4: with a filter of rollouts. P5: peak memory. P6: gate and refresh."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import gradroute as gr
from benchmarks import models
from benchmarks.memory import peak_bytes
from benchmarks.models import Shape
from benchmarks.row import Row, compared
from benchmarks.timing import Clock, interleaved


def routed_step(model: nn.Module, mask: gr.RouteMask, ids: torch.Tensor) -> None:
    with gr.route(model, mask):
        models.step(model, ids)


def two_pass_step(model: nn.Module, mask: gr.RouteMask, ids: torch.Tensor) -> None:
    """The slow reference: each zone in a pass of its own, with the other block's gradients thrown away."""
    for zone in ("kept", "absorbed", "routed"):
        rows = {"kept": mask.m == 0, "absorbed": (mask.m == 1) & (mask.g_d == 1), "routed": mask.g_d == 0}[zone]
        if rows.any():
            with gr.ablate_quarantine(model, scale=0.0 if zone == "kept" else 1.0):
                models.row_losses(model, ids[rows]).sum().backward()
    model.zero_grad()


def steps(shape: Shape, clock: Clock, rounds: int) -> list[Row]:
    """P1, with the slower alternatives beside it."""
    ids, mask = models.token_ids(shape), models.mask(shape)
    lora, routed = models.lora(shape, 2 * shape.r), models.routed(shape)
    two, detached = models.two_adapters(shape), models.routed(shape, stop_gradient="branch")
    arms = {
        "LoRA": partial(models.step, lora, ids),
        "routed": partial(routed_step, routed, mask, ids),
        "unrouted": partial(models.step, routed, ids),
        "two adapters": partial(models.step, two, ids),
        "two passes": partial(two_pass_step, routed, mask, ids),
        "branch": partial(routed_step, detached, mask, ids),
    }
    seconds = interleaved(arms, rounds, clock)
    line = partial(compared, seconds=seconds, clock=clock)
    return [
        line("P1", "routed step / LoRA of rank r + r_quarantine", arms=("routed", "LoRA"), limit=0.97),
        line("", "step without a route / LoRA of rank r + r_quarantine", arms=("unrouted", "LoRA"), limit=None),
        line("", "two PEFT adapters / LoRA of rank r + r_quarantine", arms=("two adapters", "LoRA"), limit=None),
        line("", "one pass per zone / LoRA of rank r + r_quarantine", arms=("two passes", "LoRA"), limit=None),
        line("", "branch detached / LoRA of rank r + r_quarantine", arms=("branch", "LoRA"), limit=None),
    ]


def filtered(shape: Shape, clock: Clock, rounds: int) -> list[Row]:
    """P4: RolloutFilter with directions of both kinds, against a routed step that no gradient decides."""
    ids, model, mask = models.token_ids(shape), models.routed(shape), models.mask(shape)
    authored = models.pairs(shape, 4)

    def filtered_step(by: gr.RolloutFilter, route: gr.RouteMask) -> None:
        with by.record(model), gr.route(model, route):
            models.row_losses(model, ids).sum().backward()
        gr.apply_filter(model, by)
        model.zero_grad()

    def gate(scores: torch.Tensor) -> torch.Tensor:
        return scores >= scores.median()

    arms: dict[str, Callable[[], object]] = {"ungated": partial(routed_step, model, mask, ids)}
    features: tuple[Any, ...] = ("parameter", "bottleneck")
    absorb = gr.RouteMask(*(torch.ones_like(mask.m) for _ in range(3)))
    for feature in features:
        directions = gr.extract_gradient_directions(model, authored, features=feature)
        arms[feature] = partial(filtered_step, gr.RolloutFilter(directions, gate), absorb)
    seconds = interleaved(arms, rounds, clock)
    peaks = {name: peak_bytes(arm, shape.device) for name, arm in arms.items()}
    rows = [
        compared("P4", f"step with RolloutFilter, {feature} features / routed step", seconds, (feature, "ungated"),
                 1.10, clock)
        for feature in features
    ]  # fmt: skip
    memory = [
        Row("", f"peak memory with RolloutFilter, {feature} features / routed step", peaks[feature] / peaks["ungated"],
            threads=clock.threads, detail={"MB": peaks[feature] / 1e6, "baseline_MB": peaks["ungated"] / 1e6})
        for feature in features
    ]  # fmt: skip
    return rows + memory


def memory(shape: Shape) -> list[Row]:
    """P5, with and without gradient checkpointing."""
    ids, mask, rows = models.token_ids(shape), models.mask(shape), []
    for checkpointing in (False, True):
        lora, routed = models.lora(shape, 2 * shape.r), models.routed(shape)
        for model in (lora, routed):
            if checkpointing:
                # Renamed in transformers 5.24.
                enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
                enable({"use_reentrant": False})
        plain = peak_bytes(partial(models.step, lora, ids), shape.device)
        found = peak_bytes(partial(routed_step, routed, mask, ids), shape.device)
        what = "peak memory of a routed step" + (", checkpointed" if checkpointing else "") + " / LoRA"
        rows.append(Row("P5", what, found / plain, 1.02, detail={"MB": found / 1e6, "baseline_MB": plain / 1e6}))
    return rows


def gates(shape: Shape, clock: Clock, rounds: int) -> list[Row]:
    """P6: gate and refresh as shares of a step, and the gate's cost against its history."""
    ids, model, mask = models.token_ids(shape), models.routed(shape), models.mask(shape)
    authored = models.pairs(shape, 4)
    directions = gr.extract_activation_directions(model, authored)
    pool = torch.ones_like(ids)
    with torch.no_grad(), gr.ablate_quarantine(model), gr.capture_activations(model, pool=pool) as capture:
        model(input_ids=ids, use_cache=False)
    features = dict(capture)
    refresher = gr.Refresher(
        directions, lambda: gr.extract_activation_directions(model, authored), model=model, every=1
    )

    def extract() -> None:
        with gr.ablate_quarantine(model):
            gr.extract_activation_directions(model, authored)

    history: dict[str, Callable[[], object]] = {}
    for rollouts in (10**2, 10**3, 10**4, 10**5):
        gate = gr.QuantileGate(directions)
        many = {name: rows.repeat(min(rollouts, 4000) // len(ids), 1) for name, rows in features.items()}
        for _ in range(max(1, rollouts // 4000)):
            gate(many)
        history[f"gate {rollouts}"] = partial(gate, features)
    # Before the refreshes: a gate scores its buffer again after each.
    seconds = interleaved(history, 5 * rounds, clock)
    seconds |= interleaved(
        {"step": partial(routed_step, model, mask, ids), "refresh": refresher.refresh, "extract": extract},
        rounds,
        clock,
    )
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    gate_share = middle["gate 10000"] / middle["step"]
    refresh_share = max(0.0, middle["refresh"] - middle["extract"]) / 5 / middle["step"]
    detail = {name: round(1e3 * value, 3) for name, value in middle.items()}
    return [
        Row("P6", "gate + refresh(every=5) without its extraction, share of a step", gate_share + refresh_share,
            0.02, threads=clock.threads, unit="share", detail=detail),
        Row("", "extraction of 4 pairs every 5 steps, share of a step", middle["extract"] / 5 / middle["step"],
            threads=clock.threads, unit="share"),
        compared("P6", "QuantileGate with a history of 100,000 rollouts / of 1,000", seconds,
                 ("gate 100000", "gate 1000"), None, clock),
        compared("", "QuantileGate with a history of 100 rollouts / of 1,000", seconds, ("gate 100", "gate 1000"), None,
                 clock),
    ]  # fmt: skip
