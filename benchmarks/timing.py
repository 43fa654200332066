"""Interleaved timing: A B A B ..., so that whatever disturbs the machine disturbs both.

ratio = median over rounds of t_A / t_B,  the two of one round,   with quartiles
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Arm = Callable[[], object]


@dataclass(frozen=True)
class Clock:
    """Seconds, once what was started has ended.

    Args:
        device: "cuda" waits for its kernels.
        threads: with one on the CPU, the process's own processor time is read: other processes do not count.
    """

    device: str = "cpu"
    threads: int = 1

    @property
    def kind(self) -> str:
        """Which clock it is."""
        return "processor time" if self.device == "cpu" and self.threads == 1 else "wall clock"

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.kind == "processor time" else time.perf_counter()


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of the rounds' ratios, and the median seconds of both arms."""

    median: float
    q1: float
    q3: float
    rounds: int
    seconds: float
    baseline_seconds: float


def interleaved(arms: Mapping[str, Arm], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each arm in each round, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()
    names = list(arms)
    for i in range(rounds):
        # Every second round backwards: no arm always runs after the same other one.
        for name in names if i % 2 == 0 else reversed(names):
            start = clock.now()
            arms[name]()
            seconds[name].append(clock.now() - start)
    return seconds


def ratio(seconds: Mapping[str, list[float]], arm: str, baseline: str) -> Ratio:
    """`arm` over `baseline`, round by round."""
    ratios = [a / b for a, b in zip(seconds[arm], seconds[baseline], strict=True)]
    q1, _, q3 = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    middle = [statistics.median(seconds[name]) for name in (arm, baseline)]
    return Ratio(statistics.median(ratios), q1, q3, len(ratios), *middle)
