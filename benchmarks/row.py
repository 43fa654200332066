"""One measured line of the tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.timing import Clock, Ratio, ratio


@dataclass(frozen=True)
class Row:
    """A measured ratio (or number) beside its goal.

    Args:
        goal: P1 to P9, or "" for what is reported beside them.
        what: the two things that are compared.
        value: the median; q1, q3: its quartiles, where there are rounds.
        limit: of the goal.
        detail: of how it was measured, for the JSON.
    """

    goal: str
    what: str
    value: float
    limit: float | None = None
    q1: float | None = None
    q3: float | None = None
    threads: int = 1
    unit: str = "ratio"
    detail: Mapping[str, Any] | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, in the three digits that are shown."""
        return None if self.limit is None else round(self.value, 3) <= self.limit


def compared(  # noqa: PLR0917
    goal: str, what: str, seconds: Mapping[str, list[float]], arms: tuple[str, str], limit: float | None, clock: Clock
) -> Row:
    """The row of `arms[0]` over `arms[1]`."""
    found: Ratio = ratio(seconds, *arms)
    detail = {
        "rounds": found.rounds,
        "ms": round(1e3 * found.seconds, 3),
        "baseline_ms": round(1e3 * found.baseline_seconds, 3),
        "clock": clock.kind,
    }
    return Row(goal, what, found.median, limit, found.q1, found.q3, clock.threads, detail=detail)
