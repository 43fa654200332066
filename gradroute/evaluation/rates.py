"""Records of rollouts, and counted rates with their Wilson intervals, by group of prompts.

    rate = k / n,      Wilson interval:  (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

The groups are monitored modes (the detector knows them), held-out modes (it does not), prompts without a loophole, and
then each mode. A mode that the on view never learned to exploit says nothing about suppression.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

from gradroute.errors import GradRouteError

GROUPS = ("monitored", "held-out", "no loophole")
_GROUP_OF = {True: "monitored", False: "held-out", None: "no loophole"}


@dataclass(frozen=True)
class EvalRecord:
    """One evaluated rollout.

    Args:
        mode: the exploit its prompt allows, or a name for prompts that allow none.
        monitored: whether the detector knows that exploit; None where the prompt has no loophole.
        prompt_id: the same in both views of one prompt, and in all arms that are compared prompt by prompt.
        hacked, solved: what the rollout did.
    """

    mode: str
    monitored: bool | None
    prompt_id: int | str
    hacked: bool
    solved: bool


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


@dataclass(frozen=True)
class ViewRates:
    """Hack and solve rates of one view, by group: "monitored", "held-out", "no loophole", then each mode."""

    hack: dict[str, Rate]
    solve: dict[str, Rate]

    def groups(self) -> list[str]:
        """The groups that have prompts."""
        return [group for group, rate in self.hack.items() if rate.n]

    def check_group(self, group: str, where: str = "") -> None:
        """Raise unless `group` has prompts."""
        if group not in self.groups():
            raise GradRouteError(f"`group` should have prompts{where}. Found {group!r}. Fix: one of {self.groups()}.")


def rates_by_group(records: Sequence[EvalRecord]) -> ViewRates:
    """Rates of the three groups, then of every mode.

    Raises:
        GradRouteError: a mode named like a group that it is not.
    """
    by_group: dict[str, list[EvalRecord]] = {group: [] for group in GROUPS}
    for record in records:
        if record.mode in GROUPS and _GROUP_OF[record.monitored] != record.mode:
            raise GradRouteError(f"The mode {record.mode!r} has the name of a group. Fix: rename the mode.")
        by_group[_GROUP_OF[record.monitored]].append(record)
    for record in records:
        if record.mode not in GROUPS:
            by_group.setdefault(record.mode, []).append(record)
    return ViewRates(
        hack={group: Rate(sum(bool(r.hacked) for r in found), len(found)) for group, found in by_group.items()},
        solve={group: Rate(sum(bool(r.solved) for r in found), len(found)) for group, found in by_group.items()},
    )


def rate_rows(on: ViewRates, ablated: ViewRates, groups: Sequence[str]) -> list[list[str]]:
    """The table of both views, its header first."""
    columns = {"hack on": on.hack, "hack ablated": ablated.hack, "solve on": on.solve, "solve ablated": ablated.solve}
    return [["group", *columns], *([group, *(repr(rates[group]) for rates in columns.values())] for group in groups)]
