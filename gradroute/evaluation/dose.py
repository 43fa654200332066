"""The dose curve: rates with a part of the quarantine left in.

    y = W x + s_d B_d A_d x + scale * s_q B_q A_q x,      scale 0: as deployed,   scale 1: as trained

If the hack rate falls only near scale 0, the quarantine alone carries the hack. If it falls in proportion to the scale,
both blocks carry it together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import nn

from gradroute._checks import share
from gradroute._logging import progressed
from gradroute._plot import legend_aside, new_axes
from gradroute._tables import aligned_table
from gradroute._typing import typechecked
from gradroute.errors import GradRouteError
from gradroute.evaluation._marks import draw_curves
from gradroute.evaluation._views import evaluated
from gradroute.evaluation.rates import EvalRecord, ViewRates, rates_by_group


@dataclass(frozen=True)
class DoseCurve:
    """Rates by the scale of the quarantine; `repr` prints the table.

    Args:
        rates: scale -> hack and solve rates by group, scales ascending.
    """

    rates: Mapping[float, ViewRates]

    def __repr__(self) -> str:
        return aligned_table(self.table())

    def table(self) -> list[list[str]]:
        """The rows of the table, its header first: a scale, then hack and solve rates by group."""
        groups = self.groups()
        rows = [["scale", *(f"hack, {group}" for group in groups), *(f"solve, {group}" for group in groups)]]
        for scale, view in self.rates.items():
            rates = [*(view.hack[group] for group in groups), *(view.solve[group] for group in groups)]
            rows.append([f"{scale:g}", *map(repr, rates)])
        return rows

    def groups(self) -> list[str]:
        """The groups that have prompts."""
        return next(iter(self.rates.values())).groups()

    def pick(self, *, monitored_below: float) -> float:
        """The largest measured scale whose monitored hack rate, and that of every smaller one, is below a limit.

        For `export_deployed(model, path, scale=...)`: as much of what the quarantine learned as the monitor does not
        mind. Rates are compared as counted, k / n, without their intervals. A rate that is below the limit again beyond
        a scale where it was not does not count: the hack rate has no reason to fall while the quarantine grows, so that
        such a dip is taken for chance. No scale between measured ones is picked, and the exploits that the monitor does
        not know have no say: look at their rates before you deploy.

        Args:
            monitored_below: a rate in (0, 1]: that of the base model on the same prompts, say.

        Raises:
            GradRouteError: no monitored prompts, a rate out of range, or one that the smallest scale is not below.
        """
        limit = share("monitored_below", monitored_below)
        if "monitored" not in self.groups():
            raise GradRouteError(
                f"A scale can only be picked by the hack rate of monitored prompts. Found prompts of {self.groups()}. "
                "Fix: an `eval_fn` with EvalRecord(monitored=True) for the exploits that the detector knows."
            )
        below = list(takewhile(lambda scale: self.rates[scale].hack["monitored"].value < limit, sorted(self.rates)))
        if not below:
            found = ", ".join(f"{view.hack['monitored'].value:g} at {scale:g}" for scale, view in self.rates.items())
            raise GradRouteError(
                f"`monitored_below` should be above the monitored hack rate at the smallest scale. Found {limit:g}, "
                f"and rates of {found}. Fix: smaller scales, or a limit at the upper end of the base model's interval. "
                "If scale 0 is among them, this model hacks more than that even when ablated."
            )
        return below[-1]

    def plot(self, group: str = "held-out", ax: Any = None) -> tuple[Any, Any]:
        """Hack and solve rate of one group over the scale; returns (figure, axes). Needs matplotlib.

        Raises:
            GradRouteError: a group without prompts.
        """
        next(iter(self.rates.values())).check_group(group)
        fig, ax = new_axes(ax, (6.0, 3.4))
        hack, solve = ([getattr(view, rate)[group] for view in self.rates.values()] for rate in ("hack", "solve"))
        draw_curves(ax, list(self.rates), {("hack", "on"): hack, ("solve", "ablated"): solve}, labels=("hack", "solve"))
        ax.set(xlabel="scale of the quarantine (0: as deployed, 1: as trained)", title=f"{group}, n = {hack[0].n}")
        legend_aside(ax)
        return fig, ax


@typechecked
def dose_curve(
    model: nn.Module,
    eval_fn: Callable[[nn.Module], Iterable[EvalRecord]],
    *,
    scales: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    progress: bool = True,
) -> DoseCurve:
    """Run `eval_fn(model)` with the quarantine scaled by each of `scales`, from the same random state, in eval mode.

    Args:
        model: with routed layers, under no route; modes, gradients and random numbers are left as found.
        eval_fn: as for `evaluate_on_off`.
        scales: in [0, 1], two or more different ones.
        progress: show a bar if it takes longer than two seconds and stderr is a terminal.

    Raises:
        GradRouteError: scales out of range, a model that is not in its on view, no records, or other prompts at one
            scale than at another.
        RouteError: as `evaluate_on_off`.
    """
    if len(set(scales)) < 2 or len(set(scales)) < len(scales) or not all(0 <= scale <= 1 for scale in scales):
        raise GradRouteError(f"`scales` should be two or more different numbers in [0, 1]. Found {list(scales)}.")
    shown = progressed(sorted(scales), total=len(scales), description="dose curve", progress=progress)
    found = evaluated(model, eval_fn, ((float(scale), f"at scale {scale:g}") for scale in shown), "at every scale")
    return DoseCurve({scale: rates_by_group(records) for scale, records in found.items()})
