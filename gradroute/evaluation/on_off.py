"""The same evaluation on (quarantine in place) and ablated (as deployed), with intervals."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradroute._tables import aligned_table
from gradroute._typing import typechecked
from gradroute.evaluation._marks import draw_views
from gradroute.evaluation._views import evaluated
from gradroute.evaluation.rates import EvalRecord, ViewRates, rate_rows, rates_by_group


@dataclass(frozen=True)
class Records:
    """The records behind the rates of an `OnOffReport`, in the order in which `eval_fn` returned them."""

    on: tuple[EvalRecord, ...]
    ablated: tuple[EvalRecord, ...]


@dataclass(frozen=True)
class OnOffReport:
    """Rates of the on and the ablated view over the same prompts; `repr` prints the table.

    Args:
        on, ablated: rates by group.
        records: of every rollout; None where only rates are known, and then arms are not compared prompt by prompt.
    """

    on: ViewRates
    ablated: ViewRates
    records: Records | None = None

    def __repr__(self) -> str:
        return aligned_table(rate_rows(self.on, self.ablated, list(self.on.hack)))

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the table, with intervals; returns (figure, axes). Needs matplotlib."""
        return draw_views(self.on, self.ablated, ax)


@typechecked
def evaluate_on_off(model: nn.Module, eval_fn: Callable[[nn.Module], Iterable[EvalRecord]]) -> OnOffReport:
    """Run `eval_fn(model)` with the quarantine on, then ablated, from the same random state and in eval mode.

    Args:
        model: with routed layers, under no route; modes, gradients and random numbers are left as found.
        eval_fn: generates, grades, and returns one `EvalRecord` per rollout.

    Raises:
        GradRouteError: no records, other prompts in the second view than in the first, or a mode named like a group.
        RouteError: an open route, or a routed layer that something else computes, so that its ablation is not seen.
    """
    views = [(1.0, "in the on view"), (0.0, "in the ablated view")]
    on, ablated = evaluated(model, eval_fn, views, "in both views").values()
    return OnOffReport(rates_by_group(on), rates_by_group(ablated), Records(tuple(on), tuple(ablated)))
