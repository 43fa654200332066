"""The logger "gradroute": one line per refresh (INFO) and per warning (WARNING), and nothing else.

Quiet by default. `logging.basicConfig(level="INFO")` shows the lines. Warnings are also raised as `GradRouteWarning`,
for programs that filter those.
"""

import logging
import sys
import warnings

from gradroute.errors import GradRouteWarning

logger = logging.getLogger("gradroute")
# Without a handler, logging would print the warnings to stderr a second time.
logger.addHandler(logging.NullHandler())

_BETWEEN = ("gradroute", "jaxtyping", "beartype", "contextlib", "functools", "torch")
"""Packages whose lines a warning does not point to: ours, and those through which users call it."""


def warn(message: str) -> None:
    """A `GradRouteWarning` at the user's line, the first outside of the library, and a line in the log."""
    logger.warning("%s", " ".join(message.split()))
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, GradRouteWarning, stacklevel=level)
