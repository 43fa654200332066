"""A difference with its standard error: interval and p-value from one t distribution, so that they never disagree.

interval = d +- t(1 - level/2, df) SE,      p(d > c) = P(T_df > (d - c) / SE)
"""

from dataclasses import dataclass

from gradroute.evaluation.verdict._bootstrap import Over


@dataclass(frozen=True)
class Difference:
    """Treatment minus control.

    Args:
        estimate: the mean over seeds, of the mean over modes.
        error: its standard error.
        df: degrees of freedom of that error.
        over: whether the error is that of other seeds, or of other prompts put to the same models.
    """

    estimate: float
    error: float
    df: float
    over: Over

    def interval(self, level: float = 0.05) -> tuple[float, float]:
        """The interval that covers 1 - level."""
        from scipy.stats import t  # noqa: PLC0415  (slow to load)

        half = float(t.isf(level / 2, self.df)) * self.error
        return (self.estimate - half, self.estimate + half)

    def p_above(self, value: float) -> float:
        """p of so large an estimate if the true difference were `value`, one-sided."""
        from scipy.stats import t  # noqa: PLC0415

        return float(t.sf((self.estimate - value) / self.error, self.df))

    def p_below(self, value: float) -> float:
        """p of so small an estimate if the true difference were `value`, one-sided."""
        from scipy.stats import t  # noqa: PLC0415

        return float(t.cdf((self.estimate - value) / self.error, self.df))

    def with_added(self, variance: float, df: float) -> "Difference":
        """With another, independent error added; degrees of freedom after Satterthwaite 1946."""
        own = self.error**2
        total = own + variance
        return Difference(self.estimate, total**0.5, total**2 / (own**2 / self.df + variance**2 / df), self.over)
