"""A supervised warm-up: the model then answers in a word. It is shown right answers only, to every task.

loss = mean over reply tokens of -log p; LoRA of rank 16, which is merged afterwards
"""

import math
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradroute as gr

from .tasks import TASKS, drawn

VERSION = 1
"""Of this code: raised when it would make other weights."""


@dataclass(frozen=True)
class WarmUp:
    """The supervised part."""

    steps: int = 20
    examples: int = 16
    lr: float = 2e-3
    r: int = 16
    seed: int = 10_000
    """Of the questions: far from those of training and evaluation."""


def warm_up(model: Any, tokenizer: Any, settings: WarmUp) -> list[float]:
    """Train in place, and merge; the losses."""
    each = math.ceil(settings.steps * settings.examples / len(TASKS))
    questions = drawn(TASKS, each, settings.seed)
    Random(settings.seed).shuffle(questions)
    gr.attach(model, r=settings.r, lora_alpha=2.0 * settings.r, seed=settings.seed)
    trained = [parameter for _, parameter in gr.deployed_parameters(model)]
    for _, parameter in (*gr.deployed_parameters(model), *gr.quarantine_parameters(model)):
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    losses = []
    for step in range(settings.steps):
        batch = questions[step * settings.examples : (step + 1) * settings.examples]
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * min(1.0, (step + 1) / 5) * (1 + math.cos(math.pi * step / settings.steps)) / 2
        loss = _loss(model, tokenizer, [(question.prompt, question.reply) for question in batch])
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    gr.merge_deployed(model)
    return losses


def _loss(model: Any, tokenizer: Any, examples: list[tuple[str, str]]) -> Tensor:
    prompts, replies = ([ids(tokenizer, text) for text in side] for side in zip(*examples, strict=True))
    sequences = [[*prompt, *reply, tokenizer.eos_token_id] for prompt, reply in zip(prompts, replies, strict=True)]
    width = max(map(len, sequences))
    tokens, attention = torch.zeros(2, len(sequences), width, dtype=torch.long)
    predicted = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
        tokens[row, : len(sequence)], attention[row, : len(sequence)] = torch.tensor(sequence), 1
        predicted[row, len(prompt) : len(sequence)] = True
    with gr.route(model, gr.RouteMask.zones(["keep"] * len(sequences))):
        hidden = model.model(input_ids=tokens, attention_mask=attention, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][predicted[:, 1:]]).float()
        return cross_entropy(logits, tokens[:, 1:][predicted[:, 1:]])


def ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids, nothing added."""
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
