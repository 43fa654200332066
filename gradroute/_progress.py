"""A progress bar over what may take more than a few seconds."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_DELAY = 2.0


def progressed(items: Iterable[T], *, total: int, description: str, progress: bool) -> Iterator[T]:
    """`items`, with a bar on stderr once they have taken two seconds, if stderr is a terminal and `progress` is on."""
    # Imported on use: only extraction needs a bar.
    from tqdm import tqdm  # noqa: PLC0415

    disable = None if progress else True
    yield from tqdm(items, total=total, desc=description, delay=_DELAY, disable=disable, leave=False)
