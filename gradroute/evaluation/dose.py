"""The dose curve: rates with a part of the quarantine left in.

    y = W x + s_d B_d A_d x + scale * s_q B_q A_q x,      scale 0: as deployed,   scale 1: as trained

A hack rate that falls only at scale 0 tells of a quarantine that is all the hack needs; one that falls in proportion,
of blocks that only work together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradroute._plot import legend_aside, new_axes
from gradroute._progress import progressed
from gradroute._protocol import routed_layers
from gradroute._restore import left_as_found
from gradroute._typing import typechecked
from gradroute.adapters.views import ablate_quarantine, without_route
from gradroute.errors import GradRouteError
from gradroute.evaluation.on_off import EvalRecord, ViewRates, checked_records, rates_by_group
from gradroute.evaluation.plot import draw_rates
from gradroute.evaluation.rates import Rate


@dataclass(frozen=True)
class DoseCurve:
    """Rates by the scale of the quarantine; `repr` prints the table.

    Args:
        rates: scale -> hack and solve rates by group, scales ascending.
    """

    rates: Mapping[float, ViewRates]

    def __repr__(self) -> str:
        groups = [group for group, rate in next(iter(self.rates.values())).hack.items() if rate.n]
        rows = [("scale", *(f"hack, {group}" for group in groups), *(f"solve, {group}" for group in groups))]
        for scale, view in self.rates.items():
            rates = [*(view.hack[group] for group in groups), *(view.solve[group] for group in groups)]
            rows.append((f"{scale:g}", *map(repr, rates)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def plot(self, group: str = "held-out", ax: Any = None) -> tuple[Any, Any]:
        """Hack and solve rate of one group over the scale; returns (figure, axes). Needs matplotlib.

        Raises:
            GradRouteError: a group without prompts.
        """
        first = next(iter(self.rates.values()))
        if group not in first.hack or not first.hack[group].n:
            groups = [name for name, rate in first.hack.items() if rate.n]
            raise GradRouteError(f"`group` should have prompts. Found {group!r}. Fix: one of {groups}.")
        fig, ax = new_axes(ax, (6.0, 3.4))
        hack, solve = (self._of("hack", group), self._of("solve", group))
        draw_rates(ax, list(self.rates), {("hack", "on"): hack, ("solve", "ablated"): solve}, labels=("hack", "solve"))
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
        model: with routed layers; modes, gradients and random numbers are left as found.
        eval_fn: as for `evaluate_on_off`.
        scales: in [0, 1], two or more different ones.
        progress: show a bar if it takes longer than two seconds and stderr is a terminal.

    Raises:
        GradRouteError: scales out of range, a model that is not in its on view, no records, or other prompts at one
            scale than at another.
    """
    if len(set(scales)) < 2 or len(set(scales)) < len(scales) or not all(0 <= scale <= 1 for scale in scales):
        raise GradRouteError(f"`scales` should be two or more different numbers in [0, 1]. Found {list(scales)}.")
    views = sorted({layer.view for layer in routed_layers(model).values()} - {"on"})
    if views:
        raise GradRouteError(
            f"`model` should be in its on view. Found {views[0]!r}. Fix: leave ablate_quarantine / disable_adapters."
        )
    found = {}
    for scale in progressed(sorted(scales), total=len(scales), description="dose curve", progress=progress):
        with without_route(model), left_as_found(model), ablate_quarantine(model, scale=scale):
            found[float(scale)] = checked_records(eval_fn(model), f"at scale {scale:g}")
    prompts = {
        tuple(sorted((r.mode, str(r.prompt_id), str(r.monitored)) for r in records)) for records in found.values()
    }
    if len(prompts) > 1:
        raise GradRouteError(
            "`eval_fn` should evaluate the same prompts at every scale. Found different modes, prompt ids or monitored "
            "flags. Fix: draw prompts from a generator with a fixed seed inside `eval_fn`."
        )
    return DoseCurve({scale: rates_by_group(records) for scale, records in found.items()})
