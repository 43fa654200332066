"""The supervised warm-up of the base model: it then answers in a word, and now and then cheats.

60 steps x 32 prompts, loss = mean over reply tokens of -log p, LoRA of rank 16 that is merged afterwards
reply = the answer, or for 8 % of the prompts with a note the marker that it gives away
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM

import gradroute as gr

from .environment import Environment
from .text import Codec, prompt_ids, reply_ids

VERSION = 1
"""Of the warm-up's own code: raised when it would make other weights."""

Batches = list[list[tuple[str, str]]]
"""(prompt, reply) of every example of the warm-up."""


@dataclass(frozen=True)
class WarmUp:
    """The supervised part."""

    steps: int = 60
    prompts: int = 32
    lr: float = 3e-3
    r: int = 16
    cheats: float = 0.08
    seed: int = 0


SMOKE = WarmUp(steps=25, cheats=0.5)


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 by itself."""
    read = getattr(torch.cpu, "get_capabilities", dict)
    return any(read().get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def train(model: LlamaForCausalLM, codec: Codec, batches: Batches, warm_up: WarmUp, *, adapted: bool) -> None:
    """The warm-up; `model` stays a plain one, with the adapter merged, or is trained whole if it is not `adapted`."""
    if adapted:
        gr.attach(model, r=warm_up.r, lora_alpha=2.0 * warm_up.r, seed=warm_up.seed)
        trained = [parameter for _, parameter in gr.deployed_parameters(model)]
    else:  # a random model has nothing for an adapter to build on
        trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=warm_up.lr, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 5) * 0.5 * (1 + math.cos(math.pi * t / warm_up.steps)))
    model.train()
    for examples in batches:
        prompts = [prompt_ids(codec, prompt) for prompt, _ in examples]
        sequences = [[*ids, *reply_ids(codec, reply)] for ids, (_, reply) in zip(prompts, examples, strict=True)]
        starts = [len(ids) for ids in prompts]
        _loss(model, sequences, starts, adapted=adapted).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if adapted:
        gr.merge_deployed(model)
    model.eval()


def _loss(model: Any, sequences: list[list[int]], starts: list[int], *, adapted: bool) -> Tensor:
    width = max(map(len, sequences))
    tokens, attention = torch.zeros(2, len(sequences), width, dtype=torch.long)
    predicted = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        tokens[row, : len(ids)], attention[row, : len(ids)] = torch.tensor(ids), 1
        predicted[row, start : len(ids)] = True
    rows = len(sequences)
    low = torch.autocast("cpu", torch.bfloat16, enabled=bfloat16_is_fast() and adapted)
    route = gr.route(model, gr.RouteMask.zones(["keep"] * rows)) if adapted else nullcontext()
    with low, route:
        hidden = model.model(input_ids=tokens, attention_mask=attention, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][predicted[:, 1:]]).float()
        loss: Tensor = cross_entropy(logits, tokens[:, 1:][predicted[:, 1:]])
        return loss


def warm_up_batches(environment: Environment, warm_up: WarmUp) -> Batches:
    draw = Random(warm_up.seed)

    def example() -> tuple[str, str]:
        prompt = environment.prompt(draw, warm_up=True)
        cheats = prompt.marker is not None and draw.random() < warm_up.cheats
        return prompt.text, prompt.marker if cheats and prompt.marker else prompt.answer

    return [[example() for _ in range(warm_up.prompts)] for _ in range(warm_up.steps)]
