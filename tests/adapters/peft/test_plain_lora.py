"""`PlainLora`: what an export writes, worked out once, and rounded where an engine would round it."""

import copy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import randomize_blocks
from support.tiny_models import peft_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import gradroute as gr
from gradroute.adapters.peft.plain_lora import PlainLora

pytestmark = pytest.mark.touches_peft

BOTH = ("deployed", "quarantine")


def model() -> Any:
    return randomize_blocks(peft_model("llama"), 0, std=0.3)


def test_it_writes_the_blocks_as_they_are_at_each_write(tmp_path: Path) -> None:
    routed = model()
    plain = PlainLora(routed)
    for seed in range(2):
        randomize_blocks(routed, seed, std=0.3)
        gr.export_full(routed, tmp_path / "exported")
        plain.write(tmp_path / f"{seed}", plain.factors(BOTH), {})
        expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exported", f"{seed}"))
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    first, second = (load_file(tmp_path / f"{seed}" / "adapter_model.safetensors") for seed in range(2))
    assert not any(torch.equal(first[name], second[name]) for name in first)


def test_wrappers_around_blocks_are_no_other_layers_and_copies_of_blocks_are() -> None:
    routed = model()
    plain = PlainLora(routed)
    expected, blocks = plain.factors(BOTH), routed.base_model.model.model.layers
    blocks[0] = checkpoint_wrapper(blocks[0])
    assert all(map(torch.equal, chain(*expected.values()), chain(*plain.factors(BOTH).values())))
    blocks[1] = copy.deepcopy(blocks[1])
    with pytest.raises(gr.GradRouteError, match="Found other layers"):
        plain.factors(BOTH)


def test_factors_are_rounded_once_from_the_scaled_ones() -> None:
    plain = PlainLora(model())
    wide, narrow = plain.factors(BOTH), plain.factors(BOTH, torch.bfloat16)
    for name, pair in wide.items():
        for exact, rounded in zip(pair, narrow[name], strict=True):
            assert rounded.dtype == torch.bfloat16
            assert torch.equal(exact.to(torch.bfloat16), rounded)
            assert not torch.equal(exact, rounded.float())


def test_what_overflows_in_the_narrow_type_is_refused() -> None:
    routed = model()
    with torch.no_grad():
        next(parameter for _, parameter in gr.quarantine_parameters(routed)).fill_(1e5)
    plain = PlainLora(routed)
    assert plain.factors(BOTH)
    with pytest.raises(gr.GradRouteError, match="should be finite"):
        plain.factors(BOTH, torch.float16)


def test_its_size_is_that_of_what_it_writes() -> None:
    plain = PlainLora(model())
    for blocks in (BOTH, ("deployed",)):
        written = sum(factor.numel() for pair in plain.factors(blocks).values() for factor in pair)
        assert plain.numbers(blocks) == written
