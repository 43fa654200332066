"""Low precision: as close to float64 as two passes in the same type are, and exactly zero where a gate is zero."""

import math
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from matrix import Record, cells
from torch import Tensor, nn
from two_pass import (
    Batch,
    Gradients,
    TwoPass,
    batch,
    block_norms,
    gradients,
    layer_batch,
    loss_of,
    relative_error_of_blocks,
    routed_gradients,
    routed_layer,
    routed_model,
    rows_mask,
    weighted_tokens_mask,
)

import gradroute as gr

pytestmark = pytest.mark.touches_peft

EVERY = "llama, qwen3, gpt2, moe"

# dtype of the weights, and the context of the forward
SETTINGS: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager[object]]]] = {
    "bf16 weights": (torch.bfloat16, nullcontext),
    "bf16 autocast": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
    "fp16 autocast, GradScaler": (torch.float32, lambda: torch.autocast("cpu", torch.float16)),
}
TOLERANCE = {"bf16 weights": 0.15, "bf16 autocast": 0.15, "fp16 autocast, GradScaler": 0.03}


def loss_in(setting: str) -> Callable[[nn.Module, Batch], Tensor]:
    def loss(model: nn.Module, rows: Batch) -> Tensor:
        with SETTINGS[setting][1]():
            return loss_of(model, rows)

    return loss


def scaled_gradients(model: nn.Module, rows: Batch, mask: gr.RouteMask, setting: str) -> Gradients:
    """Of a step that scales the loss, as fp16 needs, and unscales the gradients before an optimizer would see them."""
    trained = [p for _, p in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]]
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=256.0), torch.optim.SGD(trained, lr=1.0)
    with gr.route(model, mask):
        scaler.scale(loss_in(setting)(model, rows)).backward()
    scaled = block_norms(gradients(model))
    scaler.unscale_(optimizer)
    assert scaled[1] == pytest.approx(256 * block_norms(gradients(model))[1]), "nothing was unscaled"
    assert all(torch.isfinite(p.grad).all() for p in trained)
    return gradients(model)


def step_gradients(model: nn.Module, rows: Batch, mask: gr.RouteMask, setting: str) -> Gradients:
    if setting.startswith("fp16"):
        return scaled_gradients(model, rows, mask, setting)
    return routed_gradients(model, rows, mask, loss_in(setting))


@cells("{setting}", PEFT=EVERY, attach="llama", setting=SETTINGS)
def test_low_precision_adds_no_error_to_that_of_two_passes(
    architecture: str, adapters: str, setting: str, record: Record
) -> None:
    # Rounding moves these small models by chance, so errors are compared over several seeds and masks.
    dtype, errors, ratios = SETTINGS[setting][0], [], []
    for seed in range(2):
        model, rows = routed_model(architecture, adapters, dtype, seed), batch(seed)
        exact, rounded = TwoPass(model), TwoPass(model, dtype)
        unrouted = exact.gradients(rows, None)
        for mask in (rows_mask(), weighted_tokens_mask()):
            expected = exact.gradients(rows, mask)
            assert relative_error_of_blocks(unrouted, expected) > 5 * TOLERANCE[setting]
            model.zero_grad()
            errors.append(relative_error_of_blocks(step_gradients(model, rows, mask, setting), expected))
            two_passes = rounded.gradients(rows, mask, loss_in(setting))
            ratios.append(errors[-1] / relative_error_of_blocks(two_passes, expected))
    assert min(ratios) > 0
    assert math.exp(statistics.mean(map(math.log, ratios))) < 2
    record.close(statistics.median(errors), TOLERANCE[setting], ", below twice that of two passes in the same type")


@cells("{setting}, the gated block of all-route and all-keep batches", PEFT=EVERY, attach="llama", setting=SETTINGS)
def test_what_is_gated_is_exactly_zero_in_low_precision(
    architecture: str, adapters: str, setting: str, record: Record
) -> None:
    dtype = SETTINGS[setting][0]
    norms = {}
    for zone in ("keep", "absorb", "route"):
        model = routed_model(architecture, adapters, dtype)
        norms[zone] = block_norms(step_gradients(model, batch(), gr.RouteMask.zones([zone] * 3), setting))
    assert min(norms["absorb"]) > 0
    assert norms["keep"][0] > 0
    assert norms["route"][1] > 0
    record.exact(max(norms["route"][0], norms["keep"][1]), 0)


@cells("{setting}, gates between two values of the type", PEFT="llama, gpt2", attach="llama", setting=SETTINGS)
def test_gates_are_not_rounded_to_the_type_of_the_layer(
    architecture: str, adapters: str, setting: str, record: Record
) -> None:
    # Rounded before the product, the gate would be off by `excess`; what is rounded after it averages out.
    layer = routed_layer(architecture, adapters, SETTINGS[setting][0])
    rows = layer_batch(layer, seq=200)
    dtype = torch.float16 if setting.startswith("fp16") else torch.bfloat16
    excess = torch.finfo(dtype).eps / 2
    assert torch.tensor(1.25 + excess).to(dtype) == 1.25

    def step(gate: float) -> Tensor:
        layer.zero_grad()
        gates = [gate] * rows.rows
        with gr.route(layer, gr.RouteMask.weights(m=1.0, g_d=gates, g_q=gates)):
            with SETTINGS[setting][1]():
                y = layer(rows.x)
            (y * rows.upstream).sum().backward()
        return torch.cat([gradient.flatten() for gradient in gradients(layer).values()])

    plain, gated = step(1.0), step(1.25 + excess)
    found = (gated @ plain / (plain @ plain)).item()
    record.close(abs(found - 1.25 - excess) / excess, 0.5, " of half a step between two values")
