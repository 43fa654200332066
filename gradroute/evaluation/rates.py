"""A counted rate with its Wilson interval.

rate = k / n,   Wilson interval:  (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
"""

from dataclasses import dataclass
from numbers import Integral

from gradroute.errors import GradRouteError


@dataclass(frozen=True)
class Rate:
    """k of n, with its 95 % Wilson interval; n = 0 has no rate.

    Args:
        k, n: counts, 0 <= k <= n.

    Raises:
        GradRouteError: anything else.
    """

    k: int
    n: int

    def __post_init__(self) -> None:
        counts: tuple[object, object] = (self.k, self.n)
        if not all(isinstance(count, Integral) and not isinstance(count, bool) for count in counts):
            raise GradRouteError(f"`k` and `n` should be integers. Found {self.k!r} of {self.n!r}.")
        if not 0 <= self.k <= self.n:
            raise GradRouteError(f"`k` should be between 0 and n. Found {self.k} of {self.n}.")

    @staticmethod
    def from_value(value: float, n: int) -> "Rate":
        """The rate of which a result file holds value = k / n, and n.

        Raises:
            GradRouteError: a value that no k of n has.
        """
        k = round(value * n) if 0 <= value <= 1 else -1
        if k < 0 or n < 1 or abs(k - value * n) > 0.01:
            raise GradRouteError(
                f"`value` should be k / n for an integer k. Found {value!r} at n = {n}. Fix: give the n of this rate."
            )
        return Rate(k, n)

    @property
    def value(self) -> float:
        """k / n, or nan for n = 0."""
        return self.k / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval."""
        if self.n == 0:
            return (float("nan"), float("nan"))
        # Imported on use: scipy takes longer to load than everything else here.
        from scipy.stats import binomtest  # noqa: PLC0415

        ci = binomtest(self.k, self.n).proportion_ci(confidence_level=0.95, method="wilson")
        return (float(ci.low), float(ci.high))

    def __repr__(self) -> str:
        if self.n == 0:
            return "- (n=0)"
        low, high = self.interval
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}] (n={self.n})"
