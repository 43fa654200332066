"""The models that are measured: a random Llama, with PEFT's LoRA, with two of PEFT's adapters, and routed."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import gradroute as gr


@dataclass(frozen=True)
class Shape:
    """A Llama and a batch; by default the layers of SmolLM2-135M, 8 of its 30, with a small vocabulary.

    A large vocabulary would hide what adapters cost behind a head that has none.
    """

    hidden: int = 576
    mlp: int = 1536
    layers: int = 8
    heads: int = 9
    kv_heads: int = 3
    vocab: int = 512
    batch: int = 8
    seq: int = 128
    r: int = 16
    device: str = "cpu"
    dtype: str = "float32"

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of the targeted linears of one layer."""
        d, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        return [(d, d), (d, kv), (d, kv), (d, d), (d, self.mlp), (d, self.mlp), (self.mlp, d)]

    @property
    def bytes_per_number(self) -> int:
        """Of the base and of what flows through it; the blocks are in float32, as PEFT makes them."""
        return getattr(torch, self.dtype).itemsize

    @property
    def tokens(self) -> int:
        """Of one batch."""
        return self.batch * self.seq


TINY = Shape(hidden=32, mlp=64, layers=2, heads=4, kv_heads=2, vocab=64, batch=4, seq=16, r=4)


def base(shape: Shape) -> LlamaForCausalLM:
    """Random weights, the same for one shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(shape.device, getattr(torch, shape.dtype))


def lora(shape: Shape, r: int) -> nn.Module:
    """PEFT's own, of rank `r`."""
    return _filled(get_peft_model(base(shape), LoraConfig(**_options(r))))


def two_adapters(shape: Shape) -> nn.Module:
    """Two of PEFT's adapters of rank r, both active: a quarantine made of what PEFT has."""
    model = get_peft_model(base(shape), LoraConfig(**_options(shape.r)), adapter_name="deployed")
    model.add_adapter("quarantine", LoraConfig(**_options(shape.r)))
    model.base_model.set_adapter(["deployed", "quarantine"])
    return _filled(model)


def routed(shape: Shape, **options: Any) -> nn.Module:
    """Both blocks of rank r."""
    return _filled(get_peft_model(base(shape), gr.QuarantineLoraConfig(**_options(shape.r), **options)))


def _options(r: int) -> dict[str, Any]:
    return {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"}


def _filled(model: nn.Module) -> nn.Module:
    """With B = 0 there would be nothing to multiply with."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def token_ids(shape: Shape, seed: int = 0) -> Tensor:
    """A batch of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, shape.vocab, (shape.batch, shape.seq), generator=generator).to(shape.device)


def mask(shape: Shape) -> gr.RouteMask:
    """A quarter of the rows kept, a quarter routed, the rest absorbed."""
    zones = (["keep", "absorb", "route", "absorb"] * shape.batch)[: shape.batch]
    made = gr.RouteMask.zones(zones)
    return gr.RouteMask(*(each.to(shape.device) for each in (made.m, made.g_d, made.g_q)))


def row_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Each row's mean NLL."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1).mean(1)


def step(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward, gradients dropped."""
    row_losses(model, ids).sum().backward()
    model.zero_grad()


def pairs(shape: Shape, count: int, seed: int = 0) -> list[gr.ContrastivePair]:
    """Random token ids; prompts of a quarter of the length, completions of half to three quarters."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(3, shape.vocab, (n,), generator=generator).tolist()

    lengths = torch.randint(shape.seq // 2, 3 * shape.seq // 4 + 1, (count, 2), generator=generator).tolist()
    return [gr.ContrastivePair(draw(shape.seq // 4), draw(hack), draw(clean)) for hack, clean in lengths]


def scaled(shape: Shape, **changes: Any) -> Shape:
    """`shape` with other numbers."""
    return replace(shape, **changes)
