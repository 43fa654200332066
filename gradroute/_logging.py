"""The logger "gradroute": one line per refresh (INFO) and per warning (WARNING), and nothing else.

Quiet by default. `logging.basicConfig(level="INFO")` shows the lines. Warnings are also raised as `GradRouteWarning`,
for programs that filter those.
"""

import logging
import warnings

from gradroute.errors import GradRouteWarning

logger = logging.getLogger("gradroute")
# Without a handler of its own a library's warnings go to stderr, where they are raised already.
logger.addHandler(logging.NullHandler())


def warn(message: str, *, stacklevel: int = 2) -> None:
    """A `GradRouteWarning` at the caller's line, and a line in the log; `stacklevel` as for `warnings.warn`."""
    logger.warning("%s", " ".join(message.split()))
    warnings.warn(message, GradRouteWarning, stacklevel=stacklevel + 1)
