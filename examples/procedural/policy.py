"""The model, and what it says: SmolLM2-135M-Instruct, or a random model of bytes for smoke runs."""

from collections.abc import Sequence
from typing import Any

import torch
from study_models import smollm
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_trl import bytes_tokenizer

LENGTH = 12
"""Tokens of a completion. A digit is one: some right answers of `coin_flip` are longer, and out of reach anyway."""


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 by itself."""
    read = getattr(torch.cpu, "get_capabilities", dict)
    return any(read().get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def base_model(*, smoke: bool) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer that pads on the left).

    Raises:
        SystemExit: with what to install.
    """
    if smoke:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            config = LlamaConfig(vocab_size=258, pad_token_id=0, bos_token_id=None, eos_token_id=1, **sizes)
            return LlamaForCausalLM(config).eval(), bytes_tokenizer()
    try:
        import gguf  # noqa: F401, PLC0415
    except ImportError as error:
        raise SystemExit("gguf is not installed: pip install gguf") from error
    read, tokenizer = smollm()
    tokenizer.padding_side = "left"
    # A model read from GGUF says that it is quantised, though its weights are plain.
    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.tie_weights()
    # Rows of a few tokens: the fused kernel's backward takes longer here.
    model.set_attn_implementation("eager")
    model.lm_head.register_forward_pre_hook(contiguous)
    return model.eval().to(torch.bfloat16 if bfloat16_is_fast() else torch.float32), tokenizer


def contiguous(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Makes the head a hundred times faster: of a slice, a CPU multiplies every row with a copy of the weight."""
    return (inputs[0].contiguous(), *inputs[1:])


@torch.no_grad()
def said(model: nn.Module, tokenizer: Any, prompts: Sequence[str], seed: int, rows: int = 32) -> list[str]:
    """A completion of each prompt at temperature 1, in the view that is in force."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # less padding
    found = [""] * len(prompts)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            batch = tokenizer(
                [prompts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False,
                return_token_type_ids=False,
            )  # fmt: skip
            tokens: Any = model.generate(  # type: ignore[operator]
                **batch, max_new_tokens=LENGTH, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                found[i] = text
    return found
