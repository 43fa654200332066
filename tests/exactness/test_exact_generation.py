"""Generation: a row ablated among others gives what it gives alone; batches that have lost their rows are refused."""

from typing import Any

import pytest
import torch
from matrix import Record, cells
from support.tiny_models import token_ids
from torch import Tensor, nn
from transformers import GenerationConfig
from two_pass import routed_model

import gradroute as gr

pytestmark = pytest.mark.touches_peft

EVERY = "llama, qwen3, gpt2, moe"
NEW = 6
ABLATED = torch.tensor([True, False, True])


def generated(model: nn.Module, ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Greedy continuations of NEW tokens."""
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask
    lengths = {"min_new_tokens": NEW, "max_new_tokens": NEW}
    tokens: Tensor = model.generate(input_ids=ids, attention_mask=mask, **{"do_sample": False, **lengths, **options})
    return tokens[:, ids.shape[1] :]


def prompts(model: nn.Module) -> Tensor:
    """Three prompts, of which an ablated one and one that is not would be continued otherwise in the other view."""
    for seed in range(50):
        ids = token_ids(3, 5, seed)
        with gr.ablate_quarantine(model):
            off = generated(model, ids)
        differs = (off != generated(model, ids)).any(1)
        if differs[ABLATED].any() and differs[~ABLATED].any():
            return ids
    pytest.fail("ablating the quarantine changes no continuation")


def alone(model: nn.Module, ids: Tensor, use_cache: bool) -> Tensor:
    """Each row generated in a batch of its own, under a global ablation where it is to be ablated."""
    rows = []
    for row, ablated in zip(ids, ABLATED, strict=True):
        with gr.ablate_quarantine(model, 0.0 if ablated else 1.0):
            rows.append(generated(model, row[None], use_cache=use_cache))
    return torch.cat(rows)


@cells("generate, rows ablated, use_cache={use_cache}", PEFT=EVERY, attach="llama", use_cache=[True, False])
def test_ablated_rows_generate_as_they_would_alone(
    architecture: str, adapters: str, use_cache: bool, record: Record
) -> None:
    model = routed_model(architecture, adapters).eval()
    ids = prompts(model)
    with gr.ablate_quarantine(model, rows=ABLATED):
        found = generated(model, ids, use_cache=use_cache)
    assert torch.equal(found, alone(model, ids, use_cache))
    record.saw("the tokens that each row gets alone")


@cells("generate, rows ablated, left-padded prompts", PEFT=EVERY, attach="llama")
def test_ablated_rows_of_padded_prompts_generate_as_they_would_alone(
    architecture: str, adapters: str, record: Record
) -> None:
    model = routed_model(architecture, adapters).eval()
    ids = prompts(model)
    padding = torch.tensor([0, 2, 1])
    real = torch.arange(ids.shape[1])[None] >= padding[:, None]
    with gr.ablate_quarantine(model, rows=ABLATED):
        found = generated(model, ids * real, real.long())
    rows = [alone(model, ids[:, skip:], use_cache=True)[i] for i, skip in enumerate(padding)]
    assert torch.equal(found, torch.stack(rows))
    record.saw("the tokens that each row gets alone")


@cells("generate with {option}, rows ablated", PEFT="llama, gpt2", attach="llama", option=["sampling", "beams"])
def test_a_batch_that_generate_expands_is_refused(
    architecture: str, adapters: str, option: str, record: Record
) -> None:
    model = routed_model(architecture, adapters).eval()
    options: dict[str, Any] = {"sampling": {"do_sample": True, "num_return_sequences": 2}, "beams": {"num_beams": 2}}
    generated(model, token_ids(3, 5), **options[option])
    with (
        gr.ablate_quarantine(model, rows=ABLATED),
        pytest.raises(gr.errors.RouteError, match="ablation rows") as refusal,
    ):
        generated(model, token_ids(3, 5), **options[option])
    record.refused(refusal.value)


def continued(model: nn.Module, ids: Tensor) -> Any:
    """The results of transformers' continuous batching, which packs all prompts into (1, tokens)."""
    continuous = pytest.importorskip("transformers.generation.configuration_utils")
    if not hasattr(continuous, "ContinuousBatchingConfig"):
        pytest.skip("this transformers has no continuous batching that can be sized")
    sizes = continuous.ContinuousBatchingConfig(block_size=16, num_blocks=16, max_batch_tokens=64)
    # No token has the number -1: nothing ends a sequence early.
    greedy = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results: Any = model.generate_batch(
        ids.tolist(), generation_config=greedy, continuous_batching_config=sizes, progress_bar=False
    )
    return [results[key] for key in sorted(results)]


@cells("continuous batching, ablated for all", PEFT="llama, qwen3", attach="llama")
def test_continuous_batching_under_a_global_ablation_is_exact(architecture: str, adapters: str, record: Record) -> None:
    model = routed_model(architecture, adapters, torch.float32).eval()
    ids = prompts(model)
    with gr.ablate_quarantine(model):
        found = torch.tensor([result.generated_tokens for result in continued(model, ids)])
        assert torch.equal(found, generated(model, ids, eos_token_id=-1, min_new_tokens=None))
    assert not torch.equal(found, generated(model, ids, eos_token_id=-1, min_new_tokens=None))
    record.saw("the tokens of an ordinary generate under the same ablation")


@cells("continuous batching, rows ablated", PEFT="llama, qwen3", attach="llama")
def test_continuous_batching_with_ablated_rows_is_refused(architecture: str, adapters: str, record: Record) -> None:
    model = routed_model(architecture, adapters, torch.float32).eval()
    with gr.ablate_quarantine(model, rows=ABLATED):
        results = continued(model, token_ids(3, 5))
    for result in results:
        assert result.generated_tokens == []
        assert "should match the leading axes" in result.error
    record.refused(f"{results[0].error}", "RouteError")


@cells("packed (1, tokens), mask per row", PEFT=EVERY, attach="llama")
def test_packed_rows_with_a_mask_per_row_are_refused(architecture: str, adapters: str, record: Record) -> None:
    model = routed_model(architecture, adapters)
    with (
        gr.ablate_quarantine(model, rows=ABLATED),
        pytest.raises(gr.errors.RouteError, match="leading axes") as refusal,
    ):
        model(input_ids=token_ids(1, 15))
    record.refused(refusal.value)
