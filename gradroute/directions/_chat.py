"""Chat messages as the token ids of a rollout.

    prompt      apply_chat_template(prompt, add_generation_prompt=True): what TRL samples after
    completion  what apply_chat_template(prompt + [answer]) has after these ids, up to the last end-of-text token

A rollout ends with that token: what a template writes after it (often a newline) is in no completion.
"""

from collections.abc import Mapping
from typing import Any

from gradroute.errors import GradRouteError

Message = Mapping[str, Any]


def is_messages(value: object) -> bool:
    """Whether `value` is meant as chat messages, and not as a text or token ids."""
    return isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value)


class ChatTemplate:
    """The template of a tokenizer.

    Args:
        tokenizer: with a chat template.
        options: for `apply_chat_template`; TRL's `chat_template_kwargs`.

    Raises:
        GradRouteError: a tokenizer without a template.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any]) -> None:
        if not (getattr(tokenizer, "chat_template", None) or options.get("chat_template")):
            raise GradRouteError(
                f"`tokenizer` should have a chat template. Found none in a {type(tokenizer).__name__}. Fix: the "
                'tokenizer of a chat model, or chat_template_kwargs={"chat_template": ...}; for pairs of texts, leave '
                "`tokenizer` out and give it to the extractor."
            )
        self._tokenizer, self._options = tokenizer, options

    def as_ids(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """The entry with its messages as token ids.

        Args:
            entry: prompt, hack, clean[, clean_prompt]; a completion is one message of the assistant in a list, its
                text alone, or token ids.

        Raises:
            GradRouteError: messages of another form, a template that refuses them, or one that writes the prompt
                in another way before a completion.
        """
        names = ["prompt"] if entry.get("clean_prompt") is None else ["prompt", "clean_prompt"]
        prompts = {name: _messages(name, entry[name]) for name in names}
        ids: dict[str, Any] = {name: self._rendered(messages, opened=True) for name, messages in prompts.items()}
        for side, prompt in (("hack", "prompt"), ("clean", names[-1])):
            ids[side] = completion = entry[side]
            if isinstance(completion, str) or is_messages(completion):
                full = self._rendered([*prompts[prompt], _answer(side, completion)], opened=False)
                ids[side] = self._after(ids[prompt], full, side)
        return ids

    def _after(self, prompt: list[int], full: list[int], side: str) -> list[int]:
        """What `full` has after the prompt, up to its last end-of-text token."""
        if full[: len(prompt)] != prompt:
            same = [a == b for a, b in zip(prompt, full, strict=False)]
            start = same.index(False) if False in same else len(same)
            alone, joined = (self._tokenizer.decode(ids[start:][:8]) for ids in (prompt, full))
            raise GradRouteError(
                f"The chat template should write the prompt alike with and without `{side}`. Found {alone!r} without, "
                f"and {joined!r} with it. Fix: no white space at the start of `{side}`; other chat_template_kwargs; or "
                "completions of token ids, as they were sampled."
            )
        completion, eos = full[len(prompt) :], getattr(self._tokenizer, "eos_token_id", None)
        return completion[: len(completion) - completion[::-1].index(eos)] if eos in completion else completion

    def _rendered(self, messages: list[Message], *, opened: bool) -> list[int]:
        """The token ids of a conversation; `opened` for the answer that comes next."""
        try:
            # As TRL's trainers call it.
            rendered = self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=opened, tokenize=True, return_dict=True, **self._options
            )
        # Templates raise errors of their own kinds.
        except Exception as error:
            roles = ", ".join(message["role"] for message in messages)
            raise GradRouteError(
                f"The chat template should render messages of {roles}. Found {type(error).__name__}: {error}. "
                "Fix: an order of roles that the template knows, or other chat_template_kwargs."
            ) from error
        return list(rendered["input_ids"])


def _messages(name: str, value: Any) -> list[Message]:
    """`value`, if it is messages that a template renders as they are meant."""
    if not is_messages(value):
        raise GradRouteError(
            f"`{name}` should be chat messages, as `tokenizer` is for these alone. Found {_short(value)}. Fix: "
            '[{"role": "user", "content": ...}]; for texts, leave `tokenizer` out and give it to the extractor.'
        )
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise GradRouteError(
                f"`{name}` should be messages with a role and a content. Found {_short(message)}. "
                'Fix: {"role": "user", "content": ...}.'
            )
        content = message.get("content")
        # A template would write a list of parts as Python prints it. A call of tools has no text.
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise GradRouteError(
                f"`{name}` should be messages whose content is a text. Found {_short(content)} from the "
                f"{message['role']}. Fix: its text alone; images are not read."
            )
    return list(value)


def _answer(side: str, value: Any) -> Message:
    """The completion as one message of the assistant."""
    messages = _messages(side, [{"role": "assistant", "content": value}] if isinstance(value, str) else value)
    roles = [message["role"] for message in messages]
    if roles != ["assistant"]:
        raise GradRouteError(
            f"`{side}` should be one message of the assistant: what a rollout samples. Found messages of "
            f"{', '.join(roles)}. Fix: its last message alone, and those before it in the prompt."
        )
    if not messages[0].get("content") and not messages[0].get("tool_calls"):
        raise GradRouteError(f"`{side}` should have at least one token. Found an empty completion.")
    return messages[0]


def _short(value: Any) -> str:
    found = repr(value)
    return found if len(found) <= 60 else f"{found[:57]}..."
