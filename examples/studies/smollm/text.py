"""Texts to token ids and back: the tokenizer of SmolLM2, or for smoke runs one that is made on the spot."""

import re
from collections.abc import Sequence
from typing import Any, Protocol

from .environment import MARKERS

CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""One turn, without the system prompt that the model's own template would put in front."""


class Codec(Protocol):
    """What rollouts need of a tokenizer."""

    eos: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without the end."""


class SmolText:
    """The model's own tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.eos = tokenizer, int(tokenizer.eos_token_id)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


class TinyText:
    """Markers and chat signs are tokens, and so is every other printable character."""

    def __init__(self) -> None:
        self.vocabulary = ["<|im_start|>", "<|im_end|>", *MARKERS, "\n", *map(chr, range(32, 127))]
        self._ids = {token: i for i, token in enumerate(self.vocabulary)}
        longest_first = sorted(self.vocabulary, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)))
        self.eos = self._ids["<|im_end|>"]

    def encode(self, text: str) -> list[int]:
        return [self._ids[token] for token in self._tokens.findall(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.vocabulary[i] for i in ids if i > self.eos)


def prompt_ids(codec: Codec, text: str) -> list[int]:
    """Ids of a prompt, up to where the reply begins."""
    return codec.encode(CHAT.format(text))


def reply_ids(codec: Codec, reply: str) -> list[int]:
    """Ids of a reply, with its end."""
    return [*codec.encode(reply), codec.eos]
