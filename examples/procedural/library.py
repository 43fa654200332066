"""The datasets of reasoning-gym, and what their own scorers pay; the package is needed only once one is asked for.

payment = score_answer(answer, entry), 0 where the scorer raises
"""

import hashlib
import re
from importlib import metadata
from typing import Any, Protocol

INSTALL = "pip install reasoning-gym==0.1.25"
HUGE = re.compile(r"e[-+]?\d{4}", re.IGNORECASE)
Entry = dict[str, Any]
"""What a dataset yields: question, answer, metadata."""


class Items(Protocol):
    """What is used of a dataset."""

    def __getitem__(self, index: int) -> Entry: ...

    def score_answer(self, answer: str, entry: Entry) -> float:
        """From 0 to 1."""


def version() -> str:
    """Of the package.

    Raises:
        SystemExit: with what to install.
    """
    _package()
    return metadata.version("reasoning-gym")  # its own __version__ is of an earlier one


def dataset_names() -> list[str]:
    """Every dataset, except for mixtures of others."""
    _package()
    from reasoning_gym.factory import DATASETS  # noqa: PLC0415

    return sorted(name for name in DATASETS if name != "composite")


def items(name: str, *, seed: int, size: int, **config: Any) -> Items:
    """A dataset by name; equal arguments give equal items."""
    made: Items = _package().create_dataset(name, seed=seed, size=size, **config)
    return made


def payment(dataset: Items, answer: str, entry: Entry) -> float:
    """What the scorer pays for an answer.

    Some raise on text that they did not expect, and pay nothing then. Nor is 1e999999999 paid: some would write it out.
    """
    if HUGE.search(answer):
        return 0.0
    try:
        return float(dataset.score_answer(answer, entry))
    except Exception:
        return 0.0


def digest(*parts: object) -> str:
    """A name for what something was made of."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _package() -> Any:
    try:
        import reasoning_gym  # noqa: PLC0415
    except ImportError as error:
        raise SystemExit(f"reasoning-gym is not installed, or lacks {error.name}: {INSTALL}") from error
    return reasoning_gym
