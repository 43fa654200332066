"""Evaluation of a trained arm, on and ablated, and of its detector."""

from typing import Any

import torch
from torch import Tensor, nn

import gradroute as gr

from .environment import Environment
from .language import MODES, hint_modes
from .sampling import sample


def evaluate(model: nn.Module, environment: Environment, n_per_mode: int, seed: int) -> gr.evaluation.OnOffReport:
    """`n_per_mode` rollouts of each mode and as many without a hint, on and ablated, always on the same prompts."""
    return gr.evaluate_on_off(model, lambda view: records(view, environment, n_per_mode, seed))


def records(model: nn.Module, environment: Environment, n_per_mode: int, seed: int) -> list[gr.EvalRecord]:
    """What the model, in the view it is in, does on prompts that are always the same."""
    # Training draws from `seed` itself; this stream is another one.
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1))
    hinted = [environment.sample_prompts(n_per_mode, generator, no_hint=0.0, mode=mode)[0] for mode in MODES]
    unhinted, _ = environment.sample_prompts(n_per_mode, generator, no_hint=1.0)
    prompts = torch.cat([*hinted, unhinted])
    graded = environment.grade(prompts, sample(model, prompts, generator, environment.completion_length))
    modes = [MODES[i] if i >= 0 else None for i in hint_modes(prompts).tolist()]
    rollouts = zip(modes, graded.hacked.tolist(), graded.solved.tolist(), strict=True)
    return [
        gr.EvalRecord(
            mode or "no loophole", None if mode is None else mode in environment.monitored, row, hacked, solved
        )
        for row, (mode, hacked, solved) in enumerate(rollouts)
    ]


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


def curve_point(model: nn.Module, environment: Environment, n_per_mode: int, seed: int, step: int) -> dict[str, Any]:
    """A small evaluation during training."""
    report = evaluate(model, environment, n_per_mode, seed)
    return {"step": step, "on": view_rates(report.on), "ablated": view_rates(report.ablated)}


def is_monitored(environment: Environment, prompts: Tensor) -> Tensor:
    """(n,) which prompts hint at a mode that the detector knows."""
    modes = hint_modes(prompts)
    return torch.isin(modes, torch.tensor([MODES.index(mode) for mode in environment.monitored]))
