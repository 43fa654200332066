"""Contrastive (hack, clean) pairs, and the padded batches they are run in.

A pair is one prompt with two completions that differ in the mechanism: one exploits the grader, one does the task.
Two texts are tokenised joined, since tokens can merge across the boundary. The completion starts at the first token
that is not the prompt's own (longest common prefix with the tokens of the prompt alone): a merged token belongs to the
completion. Token ids are joined as they are, as in a rollout. Ids after a text are a rollout too; a text after ids is
refused, since a tokenizer may begin it with a token that no rollout has there.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gradroute._checks import positive_integer
from gradroute.errors import GradRouteError

Text = str | Sequence[int] | Tensor
Tokenizer = Callable[..., Any]

# More tokens of a prompt than this do not merge with what follows: the tokenizer treats it in some other way.
_MERGED = 4
_KEYS = ("prompt", "hack", "clean", "clean_prompt")


@dataclass(frozen=True)
class ContrastivePair:
    """One prompt, a completion that hacks the grader and one that does not; each a text or a sequence of token ids.

    Args:
        prompt: shared by both sides, or the hack side's where `clean_prompt` is given.
        hack: the exploiting completion.
        clean: the honest completion.
        clean_prompt: the clean side's own prompt; None means `prompt`.

    Raises:
        GradRouteError: neither texts nor token ids, an empty completion, or the same on both sides.
    """

    prompt: Text
    hack: Text
    clean: Text
    clean_prompt: Text | None = None

    def __post_init__(self) -> None:
        for name in _KEYS:
            value = getattr(self, name)
            if value is None and name == "clean_prompt":
                continue
            if isinstance(value, Tensor):
                value = value.tolist()
            if not isinstance(value, str):
                if not isinstance(value, list | tuple) or not all(type(token) is int and token >= 0 for token in value):
                    raise GradRouteError(f"`{name}` should be a text or a sequence of token ids. Found {value!r}.")
                object.__setattr__(self, name, tuple(value))
            if len(value) == 0 and name in ("hack", "clean"):
                raise GradRouteError(f"`{name}` should have at least one token. Found an empty completion.")
        if self.hack == self.clean and self.clean_prompt in (None, self.prompt):
            raise GradRouteError(f"`hack` and `clean` should differ. Found {self.hack!r} on both sides.")


def pair_hash(pairs: Sequence[ContrastivePair]) -> str:
    """SHA-256 of the pairs' content, in order."""
    content = [[pair.prompt, pair.hack, pair.clean, pair.clean_prompt] for pair in pairs]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class TokenizedRollout:
    """Token ids of prompt + completion, and where the completion starts."""

    ids: tuple[int, ...]
    completion_start: int


def tokenize_pairs(pairs: Sequence[ContrastivePair], tokenizer: Tokenizer | None) -> list[TokenizedRollout]:
    """The hack sides of all pairs, then their clean sides.

    Args:
        pairs: at least one.
        tokenizer: a Hugging Face tokenizer, or any callable from a text to token ids; not needed for pairs of ids.
    """
    if not pairs:
        raise GradRouteError("`pairs` should hold at least one ContrastivePair. Found none.")
    wrong = [pair for pair in pairs if not isinstance(pair, ContrastivePair)]
    if wrong:
        raise GradRouteError(f"`pairs` should hold ContrastivePair objects. Found {type(wrong[0]).__name__}.")
    hack = [(pair.prompt, pair.hack) for pair in pairs]
    clean = [(pair.prompt if pair.clean_prompt is None else pair.clean_prompt, pair.clean) for pair in pairs]
    rollouts = []
    for prompt, completion in hack + clean:
        prompt_ids = _token_ids(prompt, tokenizer)
        if isinstance(prompt, str) and isinstance(completion, str):
            ids = _token_ids(prompt + completion, tokenizer)
            start = _completion_start(prompt_ids, ids, prompt, completion)
        else:
            if isinstance(completion, str):
                raise GradRouteError(
                    f"A completion should be token ids where its prompt is. Found the text {completion[:20]!r}, in "
                    "front of which a tokenizer may put a space. Fix: give both as texts, or both as token ids."
                )
            ids = [*prompt_ids, *_token_ids(completion, tokenizer)]
            start = len(prompt_ids)
        if start == len(ids):
            raise GradRouteError(f"The completion {completion!r} has no tokens.")
        rollouts.append(TokenizedRollout(tuple(ids), start))
    return rollouts


def _completion_start(prompt_ids: Sequence[int], ids: Sequence[int], prompt: str, completion: str) -> int:
    """The length of the longest common prefix."""
    same = [a == b for a, b in zip(prompt_ids, ids, strict=False)]
    start = same.index(False) if False in same else len(same)
    if len(prompt_ids) - start > _MERGED:
        raise GradRouteError(
            f"A prompt should be tokenised alike with and without its completion, but for {_MERGED} tokens at the "
            f"boundary. Found {len(prompt_ids) - start} others before {completion[:20]!r}, after {prompt[-20:]!r}. "
            "Fix: end the prompt where its tokens end, or give token ids."
        )
    return start


def _token_ids(text: Text, tokenizer: Tokenizer | None) -> list[int]:
    if not isinstance(text, str):
        return list(text)
    if tokenizer is None:
        raise GradRouteError("`tokenizer` is needed for pairs of text. Fix: pass tokenizer=..., or pairs of token ids.")
    if not hasattr(tokenizer, "bos_token"):
        ids = tokenizer(text)
    else:
        # A chat template writes its own <bos>; a second one would shift every position.
        bos = tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    # Some templates end a text with <eos>, which would stand between prompt and completion.
    eos = getattr(tokenizer, "eos_token", None) or ""
    if eos and ids and ids[-1] == getattr(tokenizer, "eos_token_id", None):
        doubled = ids[-2:] == [ids[-1]] * 2 and not text.endswith(eos + eos)
        ids = ids if text.endswith(eos) and not doubled else ids[:-1]
    if not isinstance(ids, list | tuple) or not all(isinstance(token, int) for token in ids):
        raise GradRouteError(f"`tokenizer` should return a flat list of ids for one text. Found {ids!r}.")
    return list(ids)


@dataclass(frozen=True)
class PaddedBatch:
    """Right-padded rollouts of similar length; `index` says which rollout each row is."""

    index: Int[Tensor, " batch"]
    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"]
    completion_mask: Bool[Tensor, "batch seq"]


def batched(rollouts: Sequence[TokenizedRollout], batch_size: int, batch_tokens: int | None = None) -> list[list[int]]:
    """Group the rollouts that run together: longest first, so that little is padding and memory peaks at once.

    Args:
        batch_size: rollouts of a batch at most.
        batch_tokens: tokens of a batch at most, padding included; None for any number.

    Raises:
        GradRouteError: no positive integers, or a rollout that alone has more than `batch_tokens`.
    """
    positive_integer("batch_size", batch_size)
    positive_integer("batch_tokens", 1 if batch_tokens is None else batch_tokens)
    order = sorted(range(len(rollouts)), key=lambda i: -len(rollouts[i].ids))
    longest = len(rollouts[order[0]].ids) if order else 0
    if batch_tokens is not None and longest > batch_tokens:
        raise GradRouteError(
            f"`batch_tokens` should be at least the length of the longest rollout, {longest}. Found {batch_tokens}. "
            "Fix: more, or shorter pairs."
        )
    batches: list[list[int]] = []
    while order:
        fitting = batch_size if batch_tokens is None else min(batch_size, batch_tokens // len(rollouts[order[0]].ids))
        batches.append(order[:fitting])
        order = order[fitting:]
    return batches


def padded_batches(
    rollouts: Sequence[TokenizedRollout],
    batches: Sequence[Sequence[int]],
    device: torch.device,
    pad_token: int = 0,
) -> Iterator[PaddedBatch]:
    """The rollouts of each batch, padded on the right to the longest of it."""
    for index in batches:
        width = max(len(rollouts[i].ids) for i in index)
        ids = torch.full((len(index), width), pad_token)
        attention = torch.zeros_like(ids)
        completion = torch.zeros_like(ids, dtype=torch.bool)
        for row, rollout in enumerate(rollouts[i] for i in index):
            ids[row, : len(rollout.ids)] = torch.tensor(rollout.ids)
            attention[row, : len(rollout.ids)] = 1
            completion[row, rollout.completion_start : len(rollout.ids)] = True
        yield PaddedBatch(torch.tensor(index), ids.to(device), attention.to(device), completion.to(device))
