"""The logger "gradroute": one line per refresh (INFO) and per warning (WARNING), and nothing else; progress bars.

Quiet by default. `logging.basicConfig(level="INFO")` shows the lines. Warnings are also raised as `GradRouteWarning`,
for programs that filter those.
"""

import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import TypeVar

from gradroute.errors import GradRouteWarning

T = TypeVar("T")

logger = logging.getLogger("gradroute")
# Without a handler, logging would print the warnings to stderr a second time.
logger.addHandler(logging.NullHandler())

_BETWEEN = {
    "accelerate", "beartype", "contextlib", "functools", "gradroute", "jaxtyping", "torch", "transformers", "trl"
}  # fmt: skip
"""Packages that may lie between the user's line and a warning."""

_DELAY = 2.0
"""Seconds before a bar is shown."""


def warn(message: str) -> None:
    """A `GradRouteWarning` at the user's line, however deep in the library it is found, and a line in the log."""
    logger.warning("%s", " ".join(message.split()))
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, GradRouteWarning, stacklevel=level)


def progressed(items: Iterable[T], *, total: int, description: str, progress: bool) -> Iterator[T]:
    """`items`, with a bar on stderr once they have taken two seconds, if stderr is a terminal and `progress` is on."""
    # Imported on use: only extraction needs a bar.
    from tqdm import tqdm  # noqa: PLC0415

    disable = None if progress else True
    yield from tqdm(items, total=total, desc=description, delay=_DELAY, disable=disable, leave=False)
