"""Tied weights: the head and the embedding are one frozen tensor; a targeted head can be trained, but not merged."""

from typing import Any

import pytest
import torch
from matrix import Record, cells
from peft import get_peft_model
from support.models import randomize_blocks
from support.tiny_models import config, llama
from torch import nn
from two_pass import TwoPass, batch, expected_gradients, relative_error, routed_gradients, weighted_rows_mask

import gradroute as gr

TARGETS = {"head not targeted": ["q_proj", "down_proj"], "head targeted": ["q_proj", "down_proj", "lm_head"]}

# PEFT warns that merging a targeted head would break the tie.
pytestmark = [
    pytest.mark.touches_peft,
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def tied_model(adapters: str, targets: str) -> nn.Module:
    torch.manual_seed(0)
    base = llama(tie_word_embeddings=True).double().eval()
    if adapters == "PEFT":
        model: Any = get_peft_model(base, config(target_modules=TARGETS[targets]), autocast_adapter_dtype=False)
    else:
        model = gr.attach(base, r=3, r_quarantine=4, lora_alpha=6.0, target_modules=TARGETS[targets])
    head = model.get_output_embeddings()
    head = getattr(head, "base_layer", head)
    assert head.weight is model.get_input_embeddings().weight, "nothing is tied"
    return randomize_blocks(model, std=0.2).eval()


@cells("tie_word_embeddings=True, {targets}", PEFT="llama", attach="llama", targets=TARGETS)
def test_tied_models_are_exact(architecture: str, adapters: str, targets: str, record: Record) -> None:
    model = tied_model(adapters, targets)
    expected = expected_gradients(TwoPass(model), batch(), weighted_rows_mask())
    assert any("lm_head" in name for name in expected) == (targets == "head targeted")
    record.exact(relative_error(routed_gradients(model, batch(), weighted_rows_mask()), expected), 1e-12)


@cells("merge_deployed with a targeted tied head", PEFT="llama", attach="llama")
def test_merging_into_a_tied_head_is_refused(architecture: str, adapters: str, record: Record) -> None:
    model = tied_model(adapters, "head targeted")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(gr.errors.TargetError, match="is shared with") as refusal:
        gr.merge_deployed(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    record.refused(refusal.value)
