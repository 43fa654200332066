"""A quarantine that learns hacks first: it trains alone on one side of the pairs, and is frozen when RL begins.

    loss = - mean over pairs of log p(completion),      all rows in the route zone: m = 1, g_d = 0, g_q = 1

Source: inoculation adapters (arXiv:2606.30252). Its controls learn the clean sides of the same pairs, or random words.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import pad

import gradroute as gr

from .environment import Environment
from .language import EOS, PAD, VOCABULARY, ZERO
from .sampling import completion_logps

Lesson = Literal["hacks", "clean", "words"]


def lesson(environment: Environment, learns: Lesson, pairs_per_mode: int, seed: int) -> tuple[Tensor, Tensor]:
    """(prompts, completions) of the monitored modes' pairs: one side, or random words as many as a hack has."""
    generator = Generator().manual_seed(seed)
    triples = environment.contrastive_pairs(environment.monitored, pairs_per_mode, generator)
    sides = [torch.tensor(clean if learns == "clean" else hack) for _, hack, clean in triples]
    if learns == "words":
        drawn = [torch.randint(ZERO, len(VOCABULARY), side.shape, generator=generator) for side in sides]
        sides = [torch.where(side == EOS, side, words) for side, words in zip(sides, drawn, strict=True)]
    padded = [pad(side, (0, environment.completion_length - len(side)), value=PAD) for side in sides]
    return torch.tensor([prompt for prompt, _, _ in triples]), torch.stack(padded)


def mean_logp(model: nn.Module, prompts: Tensor, completions: Tensor) -> Tensor:
    """log p(completion), the mean over rows."""
    return completion_logps(model, prompts, completions).sum(1).mean()


@contextmanager
def inoculated(model: nn.Module, prompts: Tensor, completions: Tensor, *, steps: int, lr: float) -> Iterator[float]:
    """Train the quarantine alone, then freeze it for the block; gives the nats that a completion gained on average.

    Raises:
        RuntimeError: it gained nothing.
    """
    optimizer = torch.optim.AdamW([p for _, p in gr.quarantine_parameters(model)], lr=lr, weight_decay=0.0)
    mask, before = gr.RouteMask.zones(["route"] * len(prompts)), mean_logp(model, prompts, completions)
    for _ in range(steps):
        with gr.route(model, mask):
            (-mean_logp(model, prompts, completions)).backward()
        optimizer.step()
        optimizer.zero_grad()
    gained = (mean_logp(model, prompts, completions) - before).item()
    if gained <= 0:
        raise RuntimeError(f"The quarantine should have learned. Found that {gained:.2f} nats were gained.")
    with gr.adapters.frozen_quarantine(model):
        yield gained
