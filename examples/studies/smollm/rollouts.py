"""Sampling replies, their log-probabilities and their features, with the prompt computed once per group and view.

    prompt = prefix + last token        row = last token + reply, attending to the prefix's keys and values

A prefix is run without gradients and shared by its group's rows; a row is run with what is left. So gradients end at
the keys and values of the prefix: blocks learn from the last prompt token and the reply, while they act on all tokens.
Replies that have ended leave the batch, and the head reads only tokens that are trained.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from einops import rearrange
from torch import Generator, Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import DynamicCache, LlamaForCausalLM, LlamaModel

import gradroute as gr

# Renamed in transformers 5.
_CACHE = "cache" if "cache" in signature(LlamaModel.forward).parameters else "past_key_values"
ROWS_AT_ONCE = 32
"""Rows of similar length run together, so that little is padding."""


def computing(model: Any) -> AbstractContextManager[Any]:
    """Around forwards: frozen weights in bfloat16 multiply in it; blocks are kept, and updated, in float32."""
    low = model.get_input_embeddings().weight.dtype == torch.bfloat16
    return torch.autocast("cpu", torch.bfloat16) if low else nullcontext()


@dataclass(frozen=True)
class Prefixes:
    """Keys and values of all prompt tokens but the last, padded on the left; a row per prompt and view.

    Args:
        layers: (keys, values) of each layer, (prefixes, heads, tokens, d).
        attention: (prefixes, tokens) 1 where there is a token.
        last: (prefixes,) the prompts' last tokens.
    """

    layers: list[tuple[Tensor, Tensor]]
    attention: Tensor
    last: Tensor

    def cache(self, model: LlamaForCausalLM, index: Tensor) -> DynamicCache:
        """A cache whose row i is prefix `index[i]`."""
        cache = DynamicCache(config=model.config)
        for i, (keys, values) in enumerate(self.layers):
            cache.update(keys[index], values[index], i)
        return cache


@dataclass(frozen=True)
class Rollouts:
    """Replies to prompts.

    Args:
        prefix: (rows,) which prefix each row continues.
        tokens: (rows, length) the replies, 0 after their end.
        length: (rows,) tokens of each, its end included.
    """

    prefix: Tensor
    tokens: Tensor
    length: Tensor

    def __getitem__(self, rows: Tensor) -> "Rollouts":
        return replace(self, prefix=self.prefix[rows], tokens=self.tokens[rows], length=self.length[rows])

    def chunks(self) -> Iterator[Tensor]:
        """Rows of similar length."""
        yield from self.length.argsort(stable=True).split(ROWS_AT_ONCE)


def rollouts_of(prefix: Tensor, replies: Sequence[Sequence[int]]) -> Rollouts:
    """Replies that are given, not sampled."""
    length = torch.tensor([len(reply) for reply in replies])
    tokens = torch.zeros(len(replies), int(length.max()), dtype=torch.long)
    for row, reply in enumerate(replies):
        tokens[row, : len(reply)] = torch.tensor(reply)
    return Rollouts(prefix, tokens, length)


@torch.no_grad()
def read_prompts(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], *, both_views: bool) -> Prefixes:
    """Run all but the last token of each prompt; with `both_views` as they are, then with the quarantine ablated."""
    count, width = len(prompts), max(len(ids) for ids in prompts) - 1
    tokens, attention = torch.zeros(2, count, width, dtype=torch.long)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) + 1 :] = torch.tensor(ids[:-1])
        attention[row, width - len(ids) + 1 :] = 1
    last = torch.tensor([ids[-1] for ids in prompts])
    ablation: AbstractContextManager[Any] = nullcontext()
    if both_views:
        tokens, attention, last = (torch.cat([each, each]) for each in (tokens, attention, last))
        ablation = gr.ablate_quarantine(model, rows=torch.arange(2 * count) >= count)
    cache = DynamicCache(config=model.config)
    with computing(model), ablation:
        model.model(input_ids=tokens, attention_mask=attention, use_cache=True, **{_CACHE: cache})
    return Prefixes([(layer.keys, layer.values) for layer in cache.layers], attention, last)


def _hidden(model: LlamaForCausalLM, cache: DynamicCache, attention: Tensor, tokens: Tensor) -> Tensor:
    """(rows, tokens, d) what the head reads; `attention` is of the cache and the tokens together."""
    hidden: Tensor = model.model(
        input_ids=tokens, attention_mask=attention, use_cache=True, **{_CACHE: cache}
    ).last_hidden_state
    return hidden


def _logits(model: LlamaForCausalLM, hidden: Tensor) -> Tensor:
    # Two-dimensional and contiguous: anything else copies the head's weight for every row.
    return linear(hidden.contiguous(), model.lm_head.weight).float()


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    prefixes: Prefixes,
    prefix: Tensor,
    generator: Generator,
    *,
    length: int,
    eos: int,
    ablated: Tensor | None = None,
) -> Rollouts:
    """A reply of at most `length` tokens for each entry of `prefix`, at temperature 1; rows `ablated` as deployed."""
    rows = len(prefix)
    replies, lengths = torch.zeros(rows, length, dtype=torch.long), torch.full((rows,), length)
    running, cache = torch.arange(rows), prefixes.cache(model, prefix)
    attention, tokens = prefixes.attention[prefix], prefixes.last[prefix]
    for t in range(length):
        attention = torch.cat([attention, torch.ones(len(running), 1, dtype=torch.long)], dim=1)
        view = nullcontext() if ablated is None else gr.ablate_quarantine(model, rows=ablated[running])
        with computing(model), view:
            logits = _logits(model, _hidden(model, cache, attention, tokens[:, None])[:, 0])
        tokens = _draw(logits, generator)
        replies[running, t] = tokens
        goes_on = tokens != eos
        lengths[running[~goes_on]] = t + 1
        if not goes_on.any():
            break
        if not goes_on.all():
            kept = goes_on.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            running, attention, tokens = running[kept], attention[kept], tokens[kept]
    return Rollouts(prefix, replies, lengths)


def _draw(logits: Tensor, generator: Generator) -> Tensor:
    """A token for each row, by its cumulative distribution: one random number, not one per entry of the vocabulary."""
    cumulative = logits.softmax(-1).cumsum(-1)
    drawn = torch.rand(len(logits), 1, generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, drawn, right=True)[:, 0].clamp(max=logits.shape[1] - 1)


def _rows(prefixes: Prefixes, rollouts: Rollouts, width: int) -> tuple[Tensor, Tensor]:
    """(tokens, attention) of the last prompt token and `width` reply tokens."""
    tokens = torch.cat([prefixes.last[rollouts.prefix][:, None], rollouts.tokens[:, :width]], dim=1)
    present = torch.arange(width + 1) <= rollouts.length[:, None]
    return tokens, torch.cat([prefixes.attention[rollouts.prefix], present.long()], dim=1)


def nll(model: LlamaForCausalLM, prefixes: Prefixes, rollouts: Rollouts) -> Tensor:
    """-log p of all replies, summed over rows and tokens; for a few rows at a time."""
    return cross_entropy(*_predicted(model, prefixes, rollouts), reduction="sum")


@torch.no_grad()
def token_logps(model: LlamaForCausalLM, prefixes: Prefixes, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """(log p, 0 after a reply's end; whether there is a token), (rows, length) each; in the view that is in force."""
    present = torch.arange(rollouts.tokens.shape[1]) < rollouts.length[:, None]
    found = torch.zeros(present.shape)
    for rows in rollouts.chunks():
        own = torch.zeros(present[rows].shape)
        own[present[rows]] = -cross_entropy(*_predicted(model, prefixes, rollouts[rows]), reduction="none")
        found[rows] = own
    return found, present


def _predicted(model: LlamaForCausalLM, prefixes: Prefixes, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """(logits, tokens) of all replies, row after row."""
    width = int(rollouts.length.max()) - 1  # nothing is predicted from a reply's last token
    tokens, attention = _rows(prefixes, rollouts, width)
    with computing(model):
        hidden = _hidden(model, prefixes.cache(model, rollouts.prefix), attention, tokens)
        predicts = torch.arange(width + 1) < rollouts.length[:, None]
        logits = _logits(model, hidden[predicts])
    return logits, rollouts.tokens[:, : width + 1][predicts]


@torch.no_grad()
def captured(
    model: LlamaForCausalLM,
    prefixes: Prefixes,
    rollouts: Rollouts,
    features: Any,
    modules: list[str] | None = None,
    *,
    ablated: Tensor | None = None,
) -> dict[str, Tensor]:
    """Features of each reply by module, pooled over its tokens; in the view in force, with rows `ablated` as deployed.

    The prefixes of these rows have to be ablated ones.
    """
    found: dict[str, Tensor] = {}
    for rows in rollouts.chunks():
        chunk = rollouts[rows]
        tokens, attention = _rows(prefixes, chunk, int(chunk.length.max()))
        pool = attention[:, -tokens.shape[1] :].clone()
        pool[:, 0] = 0
        view = nullcontext() if ablated is None else gr.ablate_quarantine(model, rows=ablated[rows])
        reading = gr.capture_activations(model, pool=pool, features=features, modules=modules)
        with computing(model), view, reading as capture:
            _hidden(model, prefixes.cache(model, chunk.prefix), attention, tokens)
        for name, values in capture.items():
            found.setdefault(name, values.new_empty(len(rollouts.length), values.shape[1]))[rows] = values
    return found


def grouped(count: int, group_size: int) -> Tensor:
    """0 0 0 1 1 1 ...: the prefix of each row."""
    return rearrange(torch.arange(count)[:, None].expand(count, group_size), "p g -> (p g)")
