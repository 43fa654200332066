"""Reading pairs, from a file or from the rows of a data set: texts, token ids, or chat messages.

An entry that is no pair raises with its place; none is left out.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from gradroute.directions._chat import ChatTemplate, is_messages
from gradroute.directions.pairs import ContrastivePair
from gradroute.errors import FileFormatError, GradRouteError


def load_pairs(
    source: str | Path | Iterable[Mapping[str, Any]],
    *,
    prompt: str = "prompt",
    hack: str = "hack",
    clean: str = "clean",
    clean_prompt: str | None = None,
    tokenizer: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[ContrastivePair]:
    """Read pairs of prompt, hack, clean[, clean_prompt] from a `.json` array, a `.jsonl` file, or rows.

    Texts and lists of token ids stay as they are. Chat messages become token ids: a prompt becomes those that TRL
    samples a rollout after; a completion what the template writes next, up to the end-of-text token. It is one message
    of the assistant in a list, the text of this message, or token ids.

    Args:
        source: a file of objects without other keys; or rows, such as a split of a `datasets.DatasetDict` or a list
            of dicts, whose other columns are not read.
        prompt, hack, clean: keys or columns; TRL's preference format is read with `hack="rejected", clean="chosen"`.
        clean_prompt: key or column of the clean side's own prompt; None for `clean_prompt`, where there is one.
        tokenizer: for chat messages: then every prompt has to be messages. Pairs of texts get theirs in extraction.
        chat_template_kwargs: those of the trainer's config, for `apply_chat_template`.

    Raises:
        FileFormatError: a file that is no JSON or holds no pairs, or an entry of it that is none, named.
        GradRouteError: the same for rows; a tokenizer without a chat template, or options without a tokenizer.
    """
    if tokenizer is None and chat_template_kwargs is not None:
        raise GradRouteError(
            f"`chat_template_kwargs` should come with a tokenizer. Found {dict(chat_template_kwargs)} alone. "
            "Fix: pass tokenizer=... too."
        )
    template = None if tokenizer is None else ChatTemplate(tokenizer, chat_template_kwargs or {})
    columns = {"prompt": prompt, "hack": hack, "clean": clean, "clean_prompt": clean_prompt or "clean_prompt"}
    optional = {"clean_prompt"} if clean_prompt is None else set()
    is_file = isinstance(source, str | PathLike)
    place, kind = (str(source), FileFormatError) if is_file else ("`source`", GradRouteError)
    pairs = []
    for where, entry in _file_entries(source) if is_file else _rows(source):
        try:
            pairs.append(_pair(_fields(entry, columns, optional, others=not is_file), template))
        except GradRouteError as error:
            raise kind(f"{place}, {where}: {error}") from error
    if not pairs:
        raise kind(f"{place}: expected at least one pair. Found none.")
    return pairs


def holds_messages(path: Path) -> bool:
    """Whether some pair of a file is in chat messages.

    Raises:
        FileFormatError: a file that is no JSON.
    """
    entries = (entry for _, entry in _file_entries(path) if isinstance(entry, Mapping))
    return any(is_messages(value) for entry in entries for value in entry.values())


def _file_entries(source: Any) -> list[tuple[str, Any]]:
    """(where, entry) of a file."""
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: expected UTF-8 text ({error}).") from error
    if path.suffix == ".jsonl":
        lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        return [(where, _parsed(path, where, line)) for where, line in lines]
    if path.suffix == ".json":
        array = _parsed(path, "the file", text)
        if not isinstance(array, list):
            raise FileFormatError(f"{path}: expected a JSON array of pairs. Found a {type(array).__name__}.")
        return [(f"entry {i}", entry) for i, entry in enumerate(array)]
    raise FileFormatError(f"{path}: expected a .json or .jsonl file. Found the suffix {path.suffix!r}.")


def _parsed(path: Path, where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise FileFormatError(f"{path}, {where}: expected JSON ({error}). Is the file truncated?") from error


def _rows(source: Any) -> Iterator[tuple[str, Any]]:
    """(where, row) of a data set or a list."""
    rows = source if isinstance(source, Iterable) else [source]
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            of = f" of {type(row).__name__}" if isinstance(source, Iterable) else ""
            raise GradRouteError(
                f"`source` should be a file, or rows with a value by column. Found {type(source).__name__}{of}. Fix: "
                "one split of a DatasetDict, `select(range(n))` of a Dataset (its slices are columns), "
                '`to_dict("records")` of a data frame.'
            )
        yield f"row {i}", row


def _fields(entry: Any, columns: Mapping[str, str], optional: set[str], *, others: bool) -> dict[str, Any]:
    """The entry by the names of a `ContrastivePair`; `others` tells whether it may have other columns."""
    needed = [column for name, column in columns.items() if name not in optional]
    found = set(entry) if isinstance(entry, Mapping) else set()
    if not found.issuperset(needed) or not (others or found <= set(columns.values())):
        names = ", ".join(needed) + "".join(f"[, {columns[name]}]" for name in sorted(optional))
        shown = sorted(map(str, found)) if isinstance(entry, Mapping) else type(entry).__name__
        fix = "name the columns, as in" if others else "rename or remove keys; if they only have other names, say"
        raise GradRouteError(
            f'expected the keys {names}. Found {shown}. Fix: {fix} load_pairs(..., hack="rejected", clean="chosen").'
        )
    return {name: entry[column] for name, column in columns.items() if column in found}


def _pair(fields: dict[str, Any], template: ChatTemplate | None) -> ContrastivePair:
    if template is not None:
        fields = template.as_ids(fields)
    messages = [name for name, value in fields.items() if is_messages(value)]
    if messages:
        raise GradRouteError(
            f"`{messages[0]}` is chat messages, and `tokenizer` is needed to read them. Found None. Fix: "
            "load_pairs(..., tokenizer=tokenizer)."
        )
    return ContrastivePair(**fields)
