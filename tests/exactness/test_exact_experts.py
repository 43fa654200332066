"""Experts: a layer that gets some tokens of a batch cannot be matched with rows, and is refused."""

import pytest
import torch
from matrix import Record, cells
from peft import get_peft_model
from support.models import randomize_blocks
from support.tiny_models import base_model, config
from torch import Tensor, nn
from two_pass import (
    LORA_ALPHA,
    LayerBatch,
    TwoPass,
    batch,
    expected_gradients,
    layer_loss,
    reference,
    relative_error,
    routed_gradients,
    routed_model,
    weighted_rows_mask,
)

import gradroute as gr

pytestmark = pytest.mark.touches_peft


class LinearExperts(nn.Module):
    """A linear over (batch, seq, d), then experts that are nn.Linear and get the tokens that `chosen` gives them.

    `name` is what the module calls its experts: the library may know them by it, and must not need to.
    """

    def __init__(self, chosen: Tensor | None = None, name: str = "experts") -> None:
        super().__init__()
        self.attention = nn.Linear(4, 4)
        self.name = name
        self.add_module(name, nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
        self.chosen = chosen

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[..., 0] > 0).long() if self.chosen is None else self.chosen
        tokens = torch.tanh(self.attention(x)).flatten(0, 1)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.get_submodule(self.name)):
            (mine,) = torch.where(chosen.flatten() == index)
            out = out.index_add(0, mine, expert(tokens[mine]))
        return out.reshape(x.shape)


FIVE_AND_SEVEN = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0]])
THREE_AND_NINE = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1]])
THREE_EACH = torch.tensor([[0, 1], [1, 1], [0, 0]])  # as many tokens as the batch has rows, in both
NAMES = ["experts", "branches"]
TARGETS = {"every linear": "all-linear", "only these": r"(experts|branches)\.\d"}


def test_the_chosen_tokens_are_as_many_as_the_cells_say() -> None:
    counts = [chosen.flatten().bincount().tolist() for chosen in (FIVE_AND_SEVEN, THREE_AND_NINE, THREE_EACH)]
    assert counts == [[5, 7], [3, 9], [3, 3]]


def attached(chosen: Tensor, name: str, targets: str) -> nn.Module:
    torch.manual_seed(0)
    model = LinearExperts(chosen, name)
    gr.attach(model, r=2, lora_alpha=4.0, target_modules=TARGETS[targets])
    return randomize_blocks(model)


def refusal_of(model: nn.Module, mask: gr.RouteMask) -> gr.errors.RouteError:
    with pytest.raises(gr.errors.RouteError) as refusal, gr.route(model, mask):
        model(torch.randn(*model.chosen.shape, 4)).sum().backward()
    return refusal.value


def rows_mask() -> gr.RouteMask:
    return gr.RouteMask.zones(["keep", "absorb", "route"])


@cells("Qwen3-MoE, adapters on the attention around packed experts", PEFT="moe", attach="moe")
def test_attention_around_experts_is_exact(architecture: str, adapters: str, record: Record) -> None:
    model = routed_model(architecture, adapters)
    expected = expected_gradients(reference(architecture, adapters), batch(3), weighted_rows_mask())
    record.exact(relative_error(routed_gradients(model, batch(3), weighted_rows_mask()), expected), 1e-12)


@cells("packed experts, all-linear", PEFT="moe")
def test_packed_experts_are_refused(architecture: str, adapters: str, record: Record) -> None:
    with pytest.raises(gr.errors.TargetError, match="packed into one parameter") as refusal:
        get_peft_model(base_model(architecture), config(target_modules="all-linear"))
    record.refused(refusal.value)


@cells(
    "{called} of 5 and 7 tokens in 3 rows, {targets} targeted", attach="linear experts", called=NAMES, targets=TARGETS
)
def test_experts_that_flatten_tokens_are_refused(
    architecture: str, adapters: str, called: str, targets: str, record: Record
) -> None:
    record.refused(refusal_of(attached(FIVE_AND_SEVEN, called, targets), rows_mask()))


@cells(
    "{called} of 3 and 9 tokens in 3 rows, {targets} targeted", attach="linear experts", called=NAMES, targets=TARGETS
)
def test_one_expert_with_as_many_tokens_as_rows_is_refused(
    architecture: str, adapters: str, called: str, targets: str, record: Record
) -> None:
    record.refused(refusal_of(attached(THREE_AND_NINE, called, targets), rows_mask()))


@cells("{called} of 3 and 3 tokens in 3 rows, every linear targeted", attach="linear experts", called=NAMES)
def test_experts_with_as_many_tokens_as_rows_are_refused(
    architecture: str, adapters: str, called: str, record: Record
) -> None:
    record.refused(refusal_of(attached(THREE_EACH, called, "every linear"), rows_mask()))


# Branches under another name, and no other layer: nothing tells (rows, d) of theirs from a batch.
@cells("experts of 3 and 3 tokens in 3 rows, only these targeted", attach="linear experts")
def test_experts_with_as_many_tokens_as_rows_are_refused_without_another_layer(
    architecture: str, adapters: str, record: Record
) -> None:
    record.refused(refusal_of(attached(THREE_EACH, "experts", "only these"), rows_mask()))


@cells(
    "{called} that flatten tokens, mask per token, {targets} targeted",
    attach="linear experts",
    called=NAMES,
    targets=TARGETS,
)
def test_experts_are_refused_with_a_mask_per_token_too(
    architecture: str, adapters: str, called: str, targets: str, record: Record
) -> None:
    mask = gr.RouteMask.zones(torch.arange(12).reshape(3, 4) % 3)
    record.refused(refusal_of(attached(FIVE_AND_SEVEN, called, targets), mask))


@cells("experts that flatten tokens, not targeted", attach="linear experts")
def test_layers_below_untargeted_experts_are_exact(architecture: str, adapters: str, record: Record) -> None:
    torch.manual_seed(0)
    model = LinearExperts().double()
    gr.attach(model, r=3, r_quarantine=4, lora_alpha=LORA_ALPHA, target_modules=["attention"])
    randomize_blocks(model)
    x, upstream = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    rows = LayerBatch(x, upstream)
    expected = expected_gradients(TwoPass(model), rows, weighted_rows_mask(), layer_loss)
    found = routed_gradients(model, rows, weighted_rows_mask(), layer_loss)
    record.exact(relative_error(found, expected), 1e-12)
