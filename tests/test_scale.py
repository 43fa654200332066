"""Growth, counted and not timed: with layers, tokens, rollouts of history, and steps."""

import gc
import math
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.language_models import scoring_directions
from support.step_paths import PAIRS, STEPS, Step, stack
from torch import Tensor, nn

import gradroute as gr
from benchmarks.counts import Counts, counted

ROLLOUTS, TOKENS = 16, 65536


def recorded(depth: int, tokens: int) -> tuple[Counts, int]:
    """Counts of a filtered micro-batch and step, and the bytes kept between backward and decision."""
    model = stack(depth)
    by = gr.RolloutFilter(gr.extract_gradient_directions(model, PAIRS, features="parameter"))
    ids = torch.randint(3, 32, (ROLLOUTS, tokens // ROLLOUTS), generator=torch.Generator().manual_seed(0))
    kept = []

    def step() -> None:
        with by.record(model) as record:
            model(input_ids=ids).square().mean(dim=(1, 2)).sum().backward()
        gr.apply_filter(model, by)
        model.zero_grad()
        kept.append(record.kept_bytes)

    return counted(model, step), kept[-1]


def exponent(small: float, large: float, factor: float) -> float:
    return math.log(large / small, factor)


def test_a_filter_of_rollouts_grows_linearly_with_tokens_up_to_64_thousand_and_keeps_no_more() -> None:
    (few, kept_few), (many, kept_many) = recorded(2, TOKENS // 4), recorded(2, TOKENS)
    assert exponent(few.flops, many.flops, 4) <= 1
    assert exponent(few.bytes, many.bytes, 4) <= 1
    assert few.products == many.products
    assert kept_few == kept_many  # a matrix per rollout, not its factors per token


@pytest.mark.slow
def test_a_filter_of_rollouts_grows_linearly_with_layers_up_to_500() -> None:
    (few, kept_few), (many, kept_many) = recorded(100, 32), recorded(500, 32)
    assert exponent(few.flops, many.flops, 5) <= 1
    assert exponent(few.bytes, many.bytes, 5) <= 1
    assert many.products <= 5 * few.products
    assert kept_many == 5 * kept_few


def directions(width: int) -> gr.Directions:
    features = {"m": torch.ones(1, width)}, {"m": torch.zeros(1, width)}
    return gr.Directions({"m": torch.eye(1, width)}, *features, scoring_directions(hack=[1.0], clean=[0.0]).provenance)


def calls_of(gate: gr.QuantileGate, history: int, width: int) -> Counts:
    rows = 4000
    features = {"m": torch.randn(rows, width, generator=torch.Generator().manual_seed(0))}
    for _ in range(history // rows):
        gate(features)
    present = {"m": features["m"][:8]}
    return counted(nn.Identity(), lambda: gate(present))


def test_a_call_of_a_quantile_gate_moves_no_more_after_100_000_rollouts_than_with_a_full_buffer() -> None:
    full, far = (calls_of(gr.QuantileGate(directions(2), window=10**9), history, 2) for history in (12_000, 100_000))
    assert far == full


def test_a_call_of_a_quantile_gate_grows_linearly_with_its_buffer_up_to_100_000_rollouts() -> None:
    def moved(capacity: int) -> int:
        return calls_of(gr.QuantileGate(directions(2), capacity=capacity, window=10**9), capacity, 2).bytes

    assert exponent(moved(20_000), moved(100_000), 5) <= 1


def growth(step: Step, steps: int) -> tuple[float, float]:
    """(objects, bytes) that a step leaves behind: the least of three windows, once what is made once is there.

    The interpreter rebuilds its table of strings now and then, 15 MB where much is imported: in one window.
    """

    def after(times: int) -> tuple[int, int]:
        for _ in range(times):
            step()
        gc.collect()
        return len(gc.get_objects()), tracemalloc.get_traced_memory()[0]

    after(5)
    gc.freeze()  # what was there before does not have to be walked again in every window
    tracemalloc.start(1)
    try:
        after(5)  # memory that the pools of Python and torch take at first
        marks = [after(1), *(after(steps) for _ in range(3))]
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    objects, size = (min(b - a for a, b in pairwise(counts)) / steps for counts in zip(*marks, strict=True))
    return objects, size


LASTING = [
    "routed forward and backward", "ablate_quarantine, of all rows and of some", "capture_activations and score",
    "capture_gradients and score, inner products", "BandGate after a refresh", "QuantileGate after a refresh",
    "LogRatioGate", "Refresher.step, not due", "Refresher.step, due, mean difference",
    "ProjectionFilter after a refresh", "RolloutFilter and attach_filter", "RolloutFilter after a refresh",
    "skip_idle_blocks, a block idle", "audit_updates with directions", "project_updates", "slow_start",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", LASTING)
def test_a_step_leaves_nothing_behind(path: str) -> None:
    objects, size = growth(STEPS[path](stack(2)), 5)
    # A refresh leaves its report, of which there are few. Bytes of the pools come and go.
    assert objects < (16 if "due, " in path else 2)
    assert size < 4000


@pytest.mark.slow
def test_what_a_step_leaves_behind_would_be_seen() -> None:
    kept: list[Any] = []

    def leaks(make: Callable[[], Tensor | bytes]) -> tuple[float, float]:
        return growth(lambda: kept.append(make()), 5)

    assert leaks(lambda: torch.ones(3))[0] >= 0.9
    assert leaks(lambda: b"0" * 5000)[1] > 4000
