"""Training in one process: row and token masks, padding, packing, accumulation, offloading."""

import pytest
import torch
from matrix import Record, cells
from torch import Tensor, nn
from two_pass import (
    MASKS,
    ROWS,
    SEQ,
    Batch,
    TwoPass,
    added,
    batch,
    expected_gradients,
    gradients,
    left_padded_batch,
    loss_of,
    reference,
    relative_error,
    routed_gradients,
    routed_model,
    rows_mask,
    tokens_mask,
    weighted_logps,
    weighted_rows_mask,
    weighted_tokens_mask,
)

import gradroute as gr

pytestmark = pytest.mark.touches_peft

EVERY = "llama, qwen3, gpt2, moe"
LINEAR = "llama, qwen3, moe"
TWO_MASKS = ["zones per row", "weights per token"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "moe"])
def test_the_references_per_row_and_per_token_agree(architecture: str) -> None:
    two_pass, mask = reference(architecture, "PEFT"), weighted_rows_mask()
    per_row, per_token = (two_pass.gradients(batch(), mask, per_token=flag) for flag in (False, True))
    assert relative_error(per_token, per_row) <= 1e-13


def test_the_reference_tells_a_gated_input_gradient_from_the_true_one() -> None:
    gated = routed_model("llama", "PEFT", stop_gradient="branch")
    expected = expected_gradients(TwoPass(gated), batch(), rows_mask())
    assert relative_error(routed_gradients(gated, batch(), rows_mask()), expected) > 0.01


@cells("float64, {mask}", PEFT=EVERY, attach=LINEAR, mask=MASKS)
def test_float64_is_exact(architecture: str, adapters: str, mask: str, record: Record) -> None:
    model = routed_model(architecture, adapters)
    expected = expected_gradients(reference(architecture, adapters), batch(), MASKS[mask]())
    record.exact(relative_error(routed_gradients(model, batch(), MASKS[mask]()), expected), 1e-12)


@cells("float32, {mask}", PEFT=EVERY, attach="llama", mask=TWO_MASKS)
def test_float32_is_exact_to_its_rounding(architecture: str, adapters: str, mask: str, record: Record) -> None:
    model = routed_model(architecture, adapters, torch.float32)
    expected = expected_gradients(reference(architecture, adapters, torch.float32), batch(), MASKS[mask]())
    record.exact(relative_error(routed_gradients(model, batch(), MASKS[mask]()), expected), 1e-4)


@cells("GPT-2's Conv1D through attach", attach="gpt2")
def test_attach_refuses_a_model_without_linears(architecture: str, adapters: str, record: Record) -> None:
    with pytest.raises(gr.errors.TargetError) as refusal:
        routed_model(architecture, adapters)
    record.refused(refusal.value)


@cells("left-padded rows, against rows without padding, {mask}", PEFT=EVERY, attach="llama", mask=TWO_MASKS)
def test_padding_changes_nothing(architecture: str, adapters: str, mask: str, record: Record) -> None:
    model = routed_model(architecture, adapters)
    expected = expected_gradients(reference(architecture, adapters), left_padded_batch(), MASKS[mask]())
    record.exact(relative_error(routed_gradients(model, left_padded_batch(), MASKS[mask]()), expected), 1e-12)


@cells("route closed before backward, nothing recomputed", PEFT=EVERY, attach="llama")
def test_the_graph_keeps_a_closed_route(architecture: str, adapters: str, record: Record) -> None:
    model = routed_model(architecture, adapters)
    expected = expected_gradients(reference(architecture, adapters), batch(), rows_mask())
    with gr.route(model, rows_mask()):
        loss = loss_of(model, batch())
    loss.backward()
    record.exact(relative_error(gradients(model), expected), 1e-12)


@cells("three micro-batches with a mask each", PEFT=EVERY, attach="llama")
def test_accumulated_gradients_are_the_sum_of_the_micro_batches(
    architecture: str, adapters: str, record: Record
) -> None:
    model = routed_model(architecture, adapters)
    micro_batches = [(batch(0), rows_mask()), (batch(1), weighted_tokens_mask()), (batch(2), weighted_rows_mask())]
    two_pass = reference(architecture, adapters)
    expected = added(*(two_pass.gradients(*step) for step in micro_batches))
    first_mask_throughout = added(*(two_pass.gradients(rows, rows_mask()) for rows, _ in micro_batches))
    assert relative_error(first_mask_throughout, expected) > 0.1
    for rows, mask in micro_batches:
        found = routed_gradients(model, rows, mask)
    record.exact(relative_error(found, expected), 1e-12)


@cells("activations offloaded with save_on_cpu", PEFT=EVERY, attach="llama")
def test_save_on_cpu_is_exact(architecture: str, adapters: str, record: Record) -> None:
    model = routed_model(architecture, adapters)
    expected = expected_gradients(reference(architecture, adapters), batch(), weighted_tokens_mask())
    with gr.route(model, weighted_tokens_mask()):
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(model, batch())
        loss.backward()
    record.exact(relative_error(gradients(model), expected), 1e-12)


@cells("activations kept as bytes by saved-tensor hooks", PEFT=EVERY, attach="llama")
def test_saved_tensors_may_come_back_as_other_objects(architecture: str, adapters: str, record: Record) -> None:
    model, packed = routed_model(architecture, adapters), []

    def pack(tensor: Tensor) -> tuple[bytes, torch.dtype, torch.Size]:
        packed.append(tensor.shape)
        return tensor.detach().contiguous().numpy().tobytes(), tensor.dtype, tensor.shape

    def unpack(kept: tuple[bytes, torch.dtype, torch.Size]) -> Tensor:
        values, dtype, shape = kept
        return torch.frombuffer(bytearray(values), dtype=dtype).reshape(shape)

    expected = expected_gradients(reference(architecture, adapters), batch(), weighted_tokens_mask())
    with gr.route(model, weighted_tokens_mask()):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = loss_of(model, batch())
        loss.backward()
    assert packed.count((ROWS, SEQ, 16)) >= 8  # at least the inputs of the attention's linears
    record.exact(relative_error(gradients(model), expected), 1e-12)


@cells("packed (1, tokens) as one sequence, {mask}", PEFT=EVERY, attach="llama", mask=["zones", "weights"])
def test_a_packed_sequence_takes_a_mask_per_token(architecture: str, adapters: str, mask: str, record: Record) -> None:
    model, packed = routed_model(architecture, adapters), batch(rows=1, seq=18)
    tokens = (tokens_mask if mask == "zones" else weighted_tokens_mask)(1, 18)
    expected = expected_gradients(reference(architecture, adapters), packed, tokens)
    record.exact(relative_error(routed_gradients(model, packed, tokens), expected), 1e-12)


@cells("packed (1, tokens) with position ids, against its sequences alone", PEFT=EVERY, attach="llama")
def test_packed_sequences_equal_the_sequences_alone(architecture: str, adapters: str, record: Record) -> None:
    def packed_loss(model: nn.Module, rows: Batch) -> Tensor:
        positions = torch.arange(SEQ).repeat(ROWS)[None]
        logits = model(input_ids=rows.ids.reshape(1, -1), position_ids=positions, use_cache=False).logits
        return weighted_logps(logits.reshape(ROWS, SEQ, -1), rows)

    model, mask = routed_model(architecture, adapters), weighted_tokens_mask()
    expected = expected_gradients(reference(architecture, adapters), batch(), mask)
    packed_mask = gr.RouteMask(*(gate.reshape(1, -1) for gate in (mask.m, mask.g_d, mask.g_q)))
    record.exact(relative_error(routed_gradients(model, batch(), packed_mask, packed_loss), expected), 1e-12)
