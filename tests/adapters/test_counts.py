"""What a routed step computes, moves and keeps, counted: a regression here is a slower library, on every machine."""

import pytest
import torch
from torch import nn

import gradroute as gr
from benchmarks import models, scale
from benchmarks.counts import Counts, counted, floors
from benchmarks.models import Shape

# Wide enough for tensors of the layers' width to outweigh those of the ranks'.
SHAPE = Shape(hidden=96, mlp=256, layers=2, heads=6, kv_heads=2, vocab=32, batch=2, seq=32, r=4)


@pytest.fixture(scope="module")
def steps() -> dict[str, Counts]:
    return scale.three(SHAPE)


def test_the_counter_counts_what_the_formulas_say(steps: dict[str, Counts]) -> None:
    floor = floors(SHAPE, 2 * SHAPE.r)
    added = steps["LoRA"].minus(steps["base"])
    assert added.flops == floor["LoRA"]["flops"]
    assert added.bytes > floor["LoRA"]["bytes"]
    assert steps["base"].flops > floor["base"]["flops"]  # attention and head
    assert added.products == 6 * 7 * SHAPE.layers


def test_a_routed_step_computes_what_lora_of_both_ranks_does(steps: dict[str, Counts]) -> None:
    assert steps["routed"].flops == steps["LoRA"].flops
    assert steps["routed"].products == steps["LoRA"].products


def test_a_routed_step_moves_less_than_lora(steps: dict[str, Counts]) -> None:
    assert steps["routed"].bytes <= 0.90 * steps["LoRA"].bytes
    unrouted = models.routed(SHAPE)
    without = counted(unrouted, lambda: scale.from_embeddings(unrouted, SHAPE))
    assert without.bytes < steps["routed"].bytes <= 1.05 * without.bytes


def test_a_routed_step_keeps_what_lora_does(steps: dict[str, Counts]) -> None:
    # Eight bytes more: the number of the state that the forward ran in, for all layers.
    assert steps["routed"].saved - steps["LoRA"].saved == 8
    kept = steps["routed"].minus(steps["base"]).saved
    assert kept - 8 == scale.kept_by_blocks(SHAPE, 2 * SHAPE.r)


def test_a_counter_that_is_not_on_would_be_noticed(steps: dict[str, Counts]) -> None:
    two = models.two_adapters(SHAPE)
    found = counted(two, lambda: scale.from_embeddings(two, SHAPE))
    assert found.flops == steps["LoRA"].flops
    assert found.products > steps["LoRA"].products
    assert found.bytes > 1.1 * steps["LoRA"].bytes


@torch.no_grad()
def test_decoding_makes_two_products_per_block_and_layer() -> None:
    ids = models.token_ids(SHAPE)[:1, :1]

    def products(model: nn.Module) -> int:
        return counted(model, lambda: model(input_ids=ids, use_cache=False)).products

    linears = 7 * SHAPE.layers
    bare, routed = products(models.base(SHAPE)), models.routed(SHAPE)
    assert bare >= linears
    assert products(routed) == bare + 4 * linears
    with gr.ablate_quarantine(routed):
        assert products(routed) == bare + 2 * linears


def test_an_extraction_of_gradients_computes_no_gradient_of_weights_and_no_ablated_block() -> None:
    model, pairs = models.routed(SHAPE), models.pairs(SHAPE, 2)

    def extract() -> None:
        gr.extract_gradient_directions(model, pairs)

    on = counted(model, extract)
    with gr.ablate_quarantine(model):
        ablated = counted(model, extract)
    # Per block and linear: two products forward, two to the input backward; and what is read of each linear.
    assert on.products - ablated.products == 0  # both blocks are one product
    assert ablated.flops < on.flops
    frozen = models.routed(SHAPE).requires_grad_(False)
    step = counted(frozen, lambda: scale.from_embeddings(frozen, SHAPE))
    assert ablated.products <= step.products + 2 * 7 * SHAPE.layers


def test_an_extraction_of_activations_computes_no_logits() -> None:
    wide = models.scaled(SHAPE, vocab=4096)
    pairs = models.pairs(SHAPE, 2)

    def flops(shape: Shape) -> int:
        model = models.routed(shape)
        return counted(model, lambda: gr.extract_activation_directions(model, pairs)).flops

    head = 2 * 4 * (wide.vocab - SHAPE.vocab) * SHAPE.hidden  # one token of four rollouts
    assert flops(wide) - flops(SHAPE) == head


def test_what_routing_adds_grows_at_most_linearly() -> None:
    rows = scale.exponents(SHAPE)
    assert len(rows) == 8
    assert all(row.value > 0.3 for row in rows)
    assert [row.what for row in rows if not row.met] == []


def test_a_rollout_filter_computes_little_more_than_the_rollouts_own_gradients() -> None:
    shape = models.scaled(SHAPE, seq=128)
    model, ids = models.routed(shape), models.token_ids(shape)
    by = gr.RolloutFilter(gr.extract_gradient_directions(model, models.pairs(shape, 2), features="parameter"))

    def filtered() -> None:
        with by.record(model):
            models.row_losses(model, ids).sum().backward()
        gr.apply_filter(model, by)
        model.zero_grad()

    plain, found = counted(model, lambda: models.step(model, ids)), counted(model, filtered)
    of_rollouts = 2 * shape.tokens * shape.r * sum(d_in + d_out for d_in, d_out in shape.linears) * shape.layers
    # Bottlenecks and their gradients come from the layer: computed again, they would be as much once more.
    assert of_rollouts < found.flops - plain.flops < 1.2 * of_rollouts
