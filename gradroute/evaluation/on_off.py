"""The same evaluation on (quarantine in place) and ablated (as deployed), with intervals.

Rates are grouped by mode, and by monitored modes (the detector knows them), held-out modes (it does not) and prompts
without a loophole. A mode that the on view never learned to exploit says nothing about suppression.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradroute._protocol import routed_layers
from gradroute._restore import left_as_found
from gradroute._typing import typechecked
from gradroute.adapters.views import ablate_quarantine, without_route
from gradroute.errors import GradRouteError
from gradroute.evaluation.rates import Rate


@dataclass(frozen=True)
class EvalRecord:
    """One evaluated rollout.

    Args:
        mode: the exploit its prompt allows, or a name for prompts that allow none.
        monitored: whether the detector knows that exploit; None where the prompt has no loophole.
        prompt_id: the same for both views of one prompt, and for all arms that are to be compared prompt by prompt.
        hacked, solved: what the rollout did.
    """

    mode: str
    monitored: bool | None
    prompt_id: int | str
    hacked: bool
    solved: bool


@dataclass(frozen=True)
class ViewRates:
    """Hack and solve rates of one view, by group: a mode's name, or "monitored", "held-out", "no loophole"."""

    hack: dict[str, Rate]
    solve: dict[str, Rate]


@dataclass(frozen=True)
class Records:
    """What the rates of an `OnOffReport` were counted from, in the order in which `eval_fn` returned it."""

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
        header = ("group", "hack on", "hack ablated", "solve on", "solve ablated")
        lines: list[tuple[str, ...]] = [header]
        for group in self.on.hack:
            rates = (self.on.hack, self.ablated.hack, self.on.solve, self.ablated.solve)
            lines.append((group, *(repr(by_group[group]) for by_group in rates)))
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        return "\n".join("  ".join(cells).rstrip() for cells in padded)

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw the table, with intervals; returns (figure, axes). Needs matplotlib."""
        # Imported on use: plotting draws reports.
        from gradroute.evaluation.plot import plot_report  # noqa: PLC0415

        return plot_report(self, ax)


GROUPS = ("monitored", "held-out", "no loophole")
_GROUP_OF = {True: "monitored", False: "held-out", None: "no loophole"}


@typechecked
def evaluate_on_off(model: nn.Module, eval_fn: Callable[[nn.Module], Iterable[EvalRecord]]) -> OnOffReport:
    """Run `eval_fn(model)` with the quarantine on, then ablated, from the same random state and in eval mode.

    Args:
        model: with routed layers; modes, gradients and random numbers are left as found.
        eval_fn: generates, grades, and returns one `EvalRecord` per rollout.

    Raises:
        GradRouteError: no records, other prompts in the second view than in the first, or a mode named like a group.
    """
    views = sorted({layer.view for layer in routed_layers(model).values()} - {"on"})
    if views:
        raise GradRouteError(
            f"`model` should be in its on view, which is compared with the ablated one. Found {views[0]!r}. "
            "Fix: leave ablate_quarantine / disable_adapters first."
        )
    with without_route(model), left_as_found(model):
        on = checked_records(eval_fn(model), "in the on view")
    with without_route(model), left_as_found(model), ablate_quarantine(model):
        ablated = checked_records(eval_fn(model), "in the ablated view")
    if prompts_of(on) != prompts_of(ablated):
        raise GradRouteError(
            "`eval_fn` should evaluate the same prompts in both views. Found different modes, prompt ids or "
            "monitored flags. Fix: draw prompts from a generator with a fixed seed inside `eval_fn`."
        )
    return OnOffReport(rates_by_group(on), rates_by_group(ablated), Records(tuple(on), tuple(ablated)))


def checked_records(returned: object, where: str) -> list[EvalRecord]:
    """What `eval_fn` returned, if that is one record or more."""
    if not isinstance(returned, Iterable):
        raise GradRouteError(f"`eval_fn` should return EvalRecord objects. Found {type(returned).__name__}.")
    records = list(returned)
    if not records:
        raise GradRouteError(f"`eval_fn` should return at least one record. Found none {where}.")
    wrong = [record for record in records if not isinstance(record, EvalRecord)]
    if wrong:
        raise GradRouteError(f"`eval_fn` should return EvalRecord objects. Found {type(wrong[0]).__name__}.")
    return records


def prompts_of(records: Sequence[EvalRecord]) -> list[tuple[str, str, str]]:
    """(mode, prompt id, monitored) of every rollout, sorted: what two views have to have in common."""
    return sorted((str(r.mode), str(r.prompt_id), str(r.monitored)) for r in records)


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
