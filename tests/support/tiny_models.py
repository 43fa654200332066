"""Tiny random models of real architectures, and PEFT configs for them."""

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import gradroute as gr
from support.models import randomize_blocks

VOCAB = 32
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": VOCAB,
    **_TOKENS,
}


def llama(**options: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_SHAPE, **options}))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**_SHAPE))


def gpt2() -> PreTrainedModel:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=VOCAB, **dropout, **_TOKENS))


def moe() -> PreTrainedModel:
    """Experts are packed in one parameter each; attention is linear."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, decoder_sparse_step=1)
    )


def moe_with_dense_layers(kind: str) -> PreTrainedModel:
    """Packed experts in the second layer; linears called like them in the first, or shared by all tokens."""
    torch.manual_seed(0)
    if kind == "qwen3_moe":
        sparse: Any = {"num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": [0]}
        shape = {**_SHAPE, **sparse, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)).eval()
    shared: Any = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1}
    shape = {**_SHAPE, **shared, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return Glm4MoeForCausalLM(Glm4MoeConfig(**shape)).eval()


ARCHITECTURES = {"llama": llama, "qwen3": qwen3, "gpt2": gpt2, "moe": moe}


def base_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of one architecture; the same seed gives the same weights (rounded to `dtype`)."""
    torch.manual_seed(seed)
    return ARCHITECTURES[name]().to(dtype).eval()


def config(**options: Any) -> Any:
    """A rank 3 deployed and a rank 4 quarantine block, scaling 2, on every linear layer but the head."""
    return gr.QuarantineLoraConfig(
        **{"r": 3, "r_quarantine": 4, "lora_alpha": 6, "target_modules": "all-linear", **options}
    )


def peft_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> nn.Module:
    """A routed PEFT model with non-zero blocks."""
    if name == "gpt2":
        options = {"fan_in_fan_out": True, **options}
    if name == "moe":
        options = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], **options}
    model = get_peft_model(base_model(name, dtype, seed), config(**options), autocast_adapter_dtype=False)
    return randomize_blocks(model, seed, std=0.2).eval()


def token_ids(batch: int = 3, seq: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (batch, seq), generator=torch.Generator().manual_seed(seed))
