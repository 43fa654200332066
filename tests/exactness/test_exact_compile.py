"""torch.compile(fullgraph=True): as exact as without it, and compiled once, whatever the masks hold."""

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from matrix import Record, cells
from support.import_hook import compiles
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from two_pass import (
    TwoPass,
    batch,
    expected_gradients,
    gradients,
    layer_batch,
    layer_loss,
    loss_of,
    reference,
    relative_error,
    routed_layer,
    routed_model,
    rows_mask,
    tokens_mask,
    weighted_rows_mask,
    weighted_tokens_mask,
)

import gradroute as gr

LAYERS = "llama, gpt2"  # nn.Linear and Conv1D
SETS = {"row": (rows_mask, weighted_rows_mask), "token": (tokens_mask, weighted_tokens_mask)}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.touches_peft,
    compiles,
    # Dynamo makes one itself to trace an autograd function.
    pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module: nn.Module, backend: str = "aot_eager") -> tuple[Any, CompileCounterWithBackend]:
    """The compiled module, and a counter of its compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(module, fullgraph=True, backend=counter), counter


@cells("one layer, masks per {unit}, two sets of values", PEFT=LAYERS, attach="llama", unit=SETS)
def test_a_compiled_layer_is_exact_under_masks_of_other_values(
    architecture: str, adapters: str, unit: str, record: Record
) -> None:
    layer = routed_layer(architecture, adapters)
    fast, counter = compiled(layer)
    errors = []
    for seed, mask in enumerate(SETS[unit]):
        rows = layer_batch(layer, seed)
        expected = expected_gradients(TwoPass(layer), rows, mask(), layer_loss)
        layer.zero_grad()
        with gr.route(layer, mask()):
            layer_loss(fast, rows).backward()
        errors.append(relative_error(gradients(layer), expected))
    assert counter.frame_count == 1
    record.exact(max(errors), 1e-12, ", compiled once")


@cells("one layer, gradient to its input", PEFT=LAYERS, attach="llama")
def test_the_input_gradient_of_a_compiled_layer_is_the_true_derivative(
    architecture: str, adapters: str, record: Record
) -> None:
    layer = routed_layer(architecture, adapters)
    rows, mask = layer_batch(layer), weighted_rows_mask()
    x = rows.x.requires_grad_()
    fast, _ = compiled(layer)
    plain = TwoPass(layer)
    expected = []
    for i in range(rows.rows):
        for inner in plain.layers.values():
            inner.begin_row(mask.m[i].double().expand(rows.tokens), per_token=False)
        expected += torch.autograd.grad(layer_loss(plain.model, rows.row(i)), x)
    with gr.route(layer, mask):
        (found,) = torch.autograd.grad(layer_loss(fast, rows), x)
    (ablated,) = torch.autograd.grad(layer_loss(layer, rows), x)
    assert (ablated - sum(expected)).norm() > 0.1 * found.norm()
    record.exact(((found - sum(expected)).norm() / sum(expected).norm()).item(), 1e-12)


@cells("one layer, ablated rows, other rows", PEFT=LAYERS, attach="llama")
def test_other_ablated_rows_compile_nothing(architecture: str, adapters: str, record: Record) -> None:
    layer = routed_layer(architecture, adapters)
    x = layer_batch(layer).x
    fast, counter = compiled(layer)
    errors = []
    for rows in ([True, False, False], [False, True, True], [False, False, True]):
        ablated = torch.tensor(rows)
        with torch.no_grad(), gr.ablate_quarantine(layer):
            alone = layer(x)
        with torch.no_grad(), gr.ablate_quarantine(layer, rows=ablated):
            found = fast(x)
        with torch.no_grad():
            on = layer(x)
        assert (alone - on).norm() > 0.1 * on.norm()
        expected = torch.where(ablated[:, None, None], alone, on)
        errors.append(((found - expected).norm() / expected.norm()).item())
    assert counter.frame_count == 1
    record.exact(max(errors), 1e-12, ", compiled once")


@cells("one layer, in turn routed, ablated and routed", PEFT=LAYERS, attach="llama")
def test_a_scoring_pass_between_two_steps_compiles_nothing_new(
    architecture: str, adapters: str, record: Record
) -> None:
    layer = routed_layer(architecture, adapters)
    fast, counter = compiled(layer)
    rows, frames, errors = layer_batch(layer), [], []
    for mask in (rows_mask(), weighted_rows_mask(), rows_mask()):
        with torch.no_grad(), gr.ablate_quarantine(layer):
            ablated = fast(rows.x)
            errors.append(((ablated - layer(rows.x)).norm() / ablated.norm()).item())
        layer.zero_grad()
        with gr.route(layer, mask):
            layer_loss(fast, rows).backward()
        errors.append(relative_error(gradients(layer), expected_gradients(TwoPass(layer), rows, mask, layer_loss)))
        frames.append(counter.frame_count)
    assert frames[0] == frames[1] == frames[2]
    record.exact(max(errors), 1e-12, ", nothing compiled after the first step")


@cells("one layer that did not run inside the route", PEFT=LAYERS, attach="llama")
def test_a_compiled_layer_that_did_not_run_is_noticed(architecture: str, adapters: str, record: Record) -> None:
    layer = routed_layer(architecture, adapters)
    fast, _ = compiled(layer)
    for _ in range(2):
        with gr.route(layer, rows_mask()):
            layer_loss(fast, layer_batch(layer)).backward()  # ran, as compiled: nothing is raised
    with (
        pytest.raises(gr.errors.RouteError, match="did not run inside the route") as refusal,
        gr.route(layer, rows_mask()),
    ):
        pass
    record.refused(refusal.value)


@cells("one layer, mask of other rows than the batch", PEFT=LAYERS, attach="llama")
def test_a_compiled_layer_refuses_a_mask_that_does_not_fit(architecture: str, adapters: str, record: Record) -> None:
    layer = routed_layer(architecture, adapters)
    fast, _ = compiled(layer)
    with gr.route(layer, rows_mask()):
        fast(layer_batch(layer).x)
    # Dynamo wraps what a forward raises while it is traced.
    with pytest.raises(Exception, match="The mask of shape .* should match the leading axes") as refusal:
        with gr.route(layer, gr.RouteMask.zones(["keep"] * 4)):
            fast(layer_batch(layer).x)
    sentence = re.search(r"The mask of shape .* should match .* of the input of `[^`]*`", str(refusal.value))
    assert sentence is not None
    record.refused(sentence.group(), type(refusal.value).__name__)


@cells("the whole model", PEFT="llama")
def test_a_whole_compiled_model_is_exact(architecture: str, adapters: str, record: Record) -> None:
    model = routed_model(architecture, adapters)
    fast, counter = compiled(model)
    errors = []
    for seed, mask in enumerate((rows_mask(), weighted_rows_mask())):
        expected = expected_gradients(reference(architecture, adapters), batch(seed), mask)
        model.zero_grad()
        with gr.route(model, mask):
            loss_of(fast, batch(seed)).backward()
        errors.append(relative_error(gradients(model), expected))
    assert counter.frame_count == 1
    record.exact(max(errors), 1e-12, ", compiled once")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@cells("one layer, inductor", PEFT="llama")
def test_inductor_is_exact(architecture: str, adapters: str, record: Record, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--write-exactness") is None:
        pytest.skip("g++ takes 20 s over it; it runs when the table is written")
    if shutil.which("g++") is None:
        pytest.skip("inductor needs g++")
    layer = routed_layer(architecture, adapters)
    fast, counter = compiled(layer, "inductor")
    errors = []
    for seed, mask in enumerate((rows_mask(), weighted_rows_mask())):
        rows = layer_batch(layer, seed)
        expected = expected_gradients(TwoPass(layer), rows, mask, layer_loss)
        layer.zero_grad()
        with gr.route(layer, mask):
            layer_loss(fast, rows).backward()
        errors.append(relative_error(gradients(layer), expected))
    assert counter.frame_count == 1
    record.exact(max(errors), 1e-12, ", compiled once")
