"""Sampling completions at temperature 1, and the log-probabilities of sampled ones."""

import inspect

import torch
from torch import Generator, Tensor, nn
from transformers import DynamicCache

import gradroute as gr

from .language import EOS, PAD, PROMPT_LENGTH


@torch.no_grad()
def sample(model: nn.Module, prompts: Tensor, generator: Generator, length: int) -> Tensor:
    """(n, length) completions of (n, 8) prompts, padded after <eos>."""
    cache, tokens = DynamicCache(config=model.config), prompts
    # transformers 5.24 renamed the argument.
    named = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    completions = torch.full((len(prompts), length), PAD)
    running = torch.ones(len(prompts), dtype=torch.bool)
    for t in range(length):
        logits = model(tokens, use_cache=True, logits_to_keep=1, **{named: cache}).logits[:, -1]
        tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        completions[running, t] = tokens[running, 0]
        running = running & (tokens[:, 0] != EOS)
        if not running.any():
            break
    return completions


def completion_logps(model: nn.Module, prompts: Tensor, completions: Tensor) -> Tensor:
    """(n, length) log-probability of each completion token, 0 on padding."""
    sequences = torch.cat([prompts, completions], dim=1)
    logits = model(sequences[:, :-1], use_cache=False, logits_to_keep=completions.shape[1]).logits
    logps = logits.log_softmax(-1).gather(2, completions[:, :, None]).squeeze(2)
    return logps * (completions != PAD)


def captured(
    model: nn.Module, prompts: Tensor, completions: Tensor, ablated: Tensor | None = None
) -> gr.directions.Capture:
    """Bottleneck features of each completion; the rows `ablated` as the model would be deployed, by default all."""
    sequences = torch.cat([prompts, completions], dim=1)
    pool = sequences != PAD
    pool[:, :PROMPT_LENGTH] = False
    view = gr.ablate_quarantine(model, rows=ablated)
    with torch.no_grad(), view, gr.capture_activations(model, pool=pool) as capture:
        model(sequences, use_cache=False, logits_to_keep=1)
    return capture


def captured_gradients(
    model: nn.Module, prompts: Tensor, completions: Tensor, directions: gr.Directions | None
) -> gr.directions.Capture:
    """Gradient of each completion's mean NLL in the deployed view, or its inner products with `directions`.

    A completion without a token has the gradient 0.
    """
    length = (completions != PAD).sum(dim=1).clamp(min=1)
    with (
        gr.ablate_quarantine(model),
        gr.capture_gradients(model, features="parameter", directions=directions) as capture,
    ):
        (-completion_logps(model, prompts, completions).sum(dim=1) / length).sum().backward()
    model.zero_grad()
    return capture
