"""In a step of TRL's trainer, what the host reads of the device for routing does not grow with the layers."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.emulated_gpu import emulated_gpu
from support.models import randomize_blocks
from support.tiny_models import config, llama
from support.trl_runs import PAIRS, extract, flags, quiet, trainer

import gradroute as gr

pytestmark = [*quiet, pytest.mark.slow]


def by_gradients(model: Any) -> gr.Directions:
    return gr.extract_gradient_directions(model, PAIRS, features="parameter")


OPTIONS: dict[str, dict[str, Any]] = {
    "a gate on directions, refreshed": {"directions": extract, "refresher": 1},
    "a detector, log ratios, rows sampled ablated": {
        "detector": flags, "log_ratio_gate": 0.1, "ablated_fraction": 0.5, "slow_start_steps": 1, "ablated_from": 0,
    },
    "a filter of rollouts": {"directions": by_gradients, "grad_filter": gr.RolloutFilter},
}  # fmt: skip


def reads_of(folder: Path, depth: int, options: dict[str, Any]) -> Counter[str]:
    torch.manual_seed(0)
    model = get_peft_model(llama(num_hidden_layers=depth), config(), autocast_adapter_dtype=False)
    randomize_blocks(model, std=0.2)
    with emulated_gpu(lenient=True) as gpu:
        made = trainer(folder, model, args_max_completion_length=3, **options)
        gpu.forget()
        made.train()
    return Counter({place: count for place, count in gpu.reads.items() if place != "elsewhere"})


LINEARS = 7
"""Routed layers of a Llama's block."""


@pytest.mark.parametrize("case", OPTIONS)
def test_a_step_of_a_deep_model_reads_as_often_as_one_of_a_shallow_model(case: str, tmp_path: Path) -> None:
    shallow, deep = (reads_of(tmp_path / str(depth), depth, OPTIONS[case]) for depth in (1, 3))
    # A read more or less may depend on the values of a mask, but not on layers, of which there are so many more.
    assert max(deep[place] - shallow[place] for place in deep) < 2 * LINEARS
    assert sum(shallow.values()) > 10
