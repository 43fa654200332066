"""The dose curve: rates with a part of the quarantine left in.

    y = W x + s_d B_d A_d x + scale * s_q B_q A_q x,      scale 0: as deployed,   scale 1: as trained

If the hack rate falls only near scale 0, the quarantine alone carries the hack. If it falls in proportion to the scale,
both blocks carry it together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradroute._plot import legend_aside, new_axes
from gradroute._progress import progressed
from gradroute._tables import aligned_table
from gradroute._typing import typechecked
from gradroute.errors import GradRouteError
from gradroute.evaluation._marks import draw_curves
from gradroute.evaluation._views import Views
from gradroute.evaluation.rates import Rate, ViewRates, rates_by_group
from gradroute.evaluation.records import EvalRecord, check_same_prompts, checked_records


@dataclass(frozen=True)
class DoseCurve:
    """Rates by the scale of the quarantine; `repr` prints the table.

    Args:
        rates: scale -> hack and solve rates by group, scales ascending.
    """

    rates: Mapping[float, ViewRates]

    def __repr__(self) -> str:
        groups = next(iter(self.rates.values())).groups()
        rows = [["scale", *(f"hack, {group}" for group in groups), *(f"solve, {group}" for group in groups)]]
        for scale, view in self.rates.items():
            rates = [*(view.hack[group] for group in groups), *(view.solve[group] for group in groups)]
            rows.append([f"{scale:g}", *map(repr, rates)])
        return aligned_table(rows)

    def plot(self, group: str = "held-out", ax: Any = None) -> tuple[Any, Any]:
        """Hack and solve rate of one group over the scale; returns (figure, axes). Needs matplotlib.

        Raises:
            GradRouteError: a group without prompts.
        """
        next(iter(self.rates.values())).check_group(group)
        fig, ax = new_axes(ax, (6.0, 3.4))
        hack, solve = (self._of("hack", group), self._of("solve", group))
        draw_curves(ax, list(self.rates), {("hack", "on"): hack, ("solve", "ablated"): solve}, labels=("hack", "solve"))
        ax.set(xlabel="scale of the quarantine (0: as deployed, 1: as trained)", title=f"{group}, n = {hack[0].n}")
        legend_aside(ax)
        return fig, ax

    def _of(self, rate: str, group: str) -> list[Rate]:
        return [getattr(view, rate)[group] for view in self.rates.values()]


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
    views = Views(model)
    found = {}
    for scale in progressed(sorted(scales), total=len(scales), description="dose curve", progress=progress):
        with views.at(scale):
            found[float(scale)] = checked_records(eval_fn(model), f"at scale {scale:g}")
    check_same_prompts(found.values(), "at every scale")
    return DoseCurve({scale: rates_by_group(records) for scale, records in found.items()})
