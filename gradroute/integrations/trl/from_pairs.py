"""`directions=` from pairs: a function of the model that extracts them, once it has its blocks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gradroute.directions.directions import Directions
from gradroute.directions.extract import extract_activation_directions
from gradroute.directions.load import holds_messages, load_pairs
from gradroute.directions.pairs import ContrastivePair


def extracted_from(directions: Any, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None) -> Any:
    """`directions`, where it is a file of pairs, as the function that extracts them."""
    if not isinstance(directions, str | Path):
        return directions
    return directions_from(_pairs_in(directions, tokenizer, chat_template_kwargs), tokenizer)


def directions_from(
    pairs: str | Path | Sequence[ContrastivePair], tokenizer: Any, **options: Any
) -> Callable[[nn.Module], Directions]:
    """For `directions=`: model -> `extract_activation_directions(model, load_pairs(pairs), tokenizer=..., ...)`.

    Args:
        pairs: a file of texts, token ids or chat messages, which is read now; or pairs, such as those that
            `load_pairs` makes of chat messages with `chat_template_kwargs`.
        tokenizer, options: as the extractor takes them. Messages become token ids by the tokenizer's chat template.

    The trainer calls the function with the quarantine ablated, which is the view that it scores rollouts in.
    """
    loaded = _pairs_in(pairs, tokenizer, None) if isinstance(pairs, str | Path) else pairs
    return lambda model: extract_activation_directions(model, loaded, tokenizer=tokenizer, **options)


def _pairs_in(
    file: str | Path, tokenizer: Any, chat_template_kwargs: Mapping[str, Any] | None
) -> list[ContrastivePair]:
    if not holds_messages(Path(file)):
        return load_pairs(file)
    return load_pairs(file, tokenizer=tokenizer, chat_template_kwargs=chat_template_kwargs)
