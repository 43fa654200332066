"""A card's account of the routing: gates and filters, their directions, and the refresher of these."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from gradroute._checks import instance_of
from gradroute._hashing import model_identity
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError
from gradroute.filters.base import GradientFilter
from gradroute.gates.base import Gate
from gradroute.refresh.refresher import Refresher


@runtime_checkable
class RoutedRun(Protocol):
    """Everything that a run routed by, such as `trainer.routing` of the TRL trainer; each attribute may be None.

    Where there is a `detector` or a `log_ratio_gate` too, the card names it.
    """

    gate: Any
    directions: Any
    refresher: Any
    filter: Any


RoutedBy = Gate | GradientFilter | RoutedRun | str


@dataclass(frozen=True)
class Method:
    """A card's account of the routing.

    Args:
        deciders: gates, filters and detectors, or a sentence, as the card prints them.
        masks: the zones or weights, in words.
        directions: that decided; empty where none did.
        refresher: of one of `directions`; None where all were frozen.
    """

    deciders: Sequence[str]
    masks: str
    directions: Sequence[Directions]
    refresher: Refresher | None

    def rows(self) -> list[list[str]]:
        """(what, value) for the card's table."""
        rows = [["masks", self.masks], ["routed by", "; ".join(self.deciders)]]
        for directions in self.directions:
            rows += [
                ["direction", f"`{directions!r}`"],
                ["direction, SHA-256", directions.content_hash],
                ["pairs", f"{directions.n_pairs} contrastive pairs, SHA-256 {directions.provenance.pair_hash}"],
                ["refresh", self._refresh_of(directions)],
            ]
        return rows

    def caveats(self) -> list[str]:
        """Caveats that follow from the directions and their refresher."""
        found = []
        for directions in self.directions:
            control = directions.provenance.control
            if control is not None:
                found.append(f"The direction is a control ({control}), not an extracted one.")
            refresher = self._refresher_of(directions)
            if refresher is None:
                found.append("The direction was frozen: it is that of the model it was extracted from.")
            elif not refresher.reports:
                found.append("No refresh came due: the direction is that of the model it was extracted from.")
        return found

    def _refresher_of(self, directions: Directions) -> Refresher | None:
        refresher = self.refresher
        return refresher if refresher is not None and refresher.directions is directions else None

    def _refresh_of(self, directions: Directions) -> str:
        refresher = self._refresher_of(directions)
        if refresher is None:
            return "none: the directions stayed as extracted"
        reports = refresher.reports
        last = f"the last one at step {reports[-1].step}" if reports else "none of them due"
        return f"`{refresher!r}` in {refresher.steps} steps, {last}"


def method_of(model: nn.Module, routed_by: RoutedBy, masks: str | None, refresher: Refresher | None) -> Method:
    """The method of a run, read from its objects.

    Raises:
        GradRouteError: nothing that decides, masks that nothing tells, a refresher of other directions, or directions
            of another base model.
    """
    deciders = _deciders(routed_by)
    refresher = _refresher(routed_by, refresher)
    # A sentence holds no directions: then those of the refresher decided.
    held: list[Any] = [getattr(each, "directions", None) for each in (routed_by, *deciders) if deciders]
    held += [] if deciders or refresher is None else [refresher.directions]
    directions = list({id(each): each for each in held if each is not None}.values())
    if refresher is not None and all(each is not refresher.directions for each in directions):
        raise GradRouteError(
            f"`refresher` should refresh the directions of `routed_by`. Found {refresher.directions!r} there and "
            f"{directions} here. Fix: give the refresher of this gate, or None if its directions were frozen."
        )
    if any(each.provenance.model != model_identity(model) for each in directions):
        raise GradRouteError(
            "`routed_by` should read directions of `model`. Found directions of another base model. Fix: give the gate "
            "and the model of one run."
        )
    named = [f"`{each!r}`" for each in deciders] or [str(routed_by)]
    detector = getattr(routed_by, "detector", None)
    if detector is not None:
        recall = getattr(routed_by, "detector_recall", None)
        said = "" if recall is None else f", said to flag {recall:g} of all hacks"
        named.append(f"detector `{getattr(detector, '__name__', type(detector).__name__)}`{said}")
    return Method(named, _masks(deciders, masks), directions, refresher)


def _deciders(routed_by: RoutedBy) -> list[Gate | GradientFilter]:
    """Gates and filters; none for a sentence."""
    if isinstance(routed_by, str) and routed_by.strip():
        return []
    if isinstance(routed_by, Gate | GradientFilter):
        return [routed_by]
    if isinstance(routed_by, RoutedRun):
        explains = getattr(routed_by, "log_ratio_gate", None)
        found = [each for each in (routed_by.gate, explains, routed_by.filter) if each is not None]
        if found and all(isinstance(each, Gate | GradientFilter) for each in found):
            return found
    raise GradRouteError(
        "`routed_by` should be the gate or filter that was trained with, the `routing` of a trainer, or a sentence. "
        f"Found {routed_by!r}."
    )


def _refresher(routed_by: RoutedBy, refresher: Refresher | None) -> Refresher | None:
    own: Refresher | None = getattr(routed_by, "refresher", None)
    if refresher is None:
        return own
    instance_of("refresher", refresher, Refresher, "leave `refresher` out where directions were frozen.")
    if own not in (None, refresher):
        raise GradRouteError(
            f"`refresher` should be that of `routed_by`. Found {refresher!r} and {own!r}. Fix: leave `refresher` out."
        )
    return refresher


def _masks(deciders: Sequence[Gate | GradientFilter], masks: str | None) -> str:
    if masks is None and deciders:
        return "; ".join(each.describe() for each in deciders)
    if masks is None:
        raise GradRouteError(
            "`masks` should say what the zones or weights were. Found None, and a sentence in `routed_by`. "
            'Fix: masks="classic: flagged rows train the quarantine only, the others both blocks", say.'
        )
    if not isinstance(masks, str) or not masks.strip():
        raise GradRouteError(f"`masks` should be a sentence or None. Found {masks!r}.")
    return masks
