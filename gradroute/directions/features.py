"""The features of rollouts, as data, and the origin of directions: together they tell what fits what.

capture[module]: (rows, d_feature), a row per rollout; several forwards concatenate in order
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gradroute._checks import listed
from gradroute._hashing import known_identity
from gradroute._transfers import read_together
from gradroute.directions._draws import Control
from gradroute.directions._reading import Feature, Reduction, Source
from gradroute.errors import GradRouteError, RefreshError


@dataclass(frozen=True)
class Provenance:
    """The origin of directions.

    Args:
        source: "activation" or "gradient".
        feature, reduction: see `capture_activations`.
        estimator: `str` of the estimator, such as "mean_difference"; "random" for random controls.
        pair_hash: SHA-256 of the pairs.
        model: identity of the frozen base model.
        view: the view of the model that was measured, as `RoutedLayer.view` names it.
        seed: of a control.
        control: None for the real thing; see `gradroute.directions.controls`.
    """

    source: str
    feature: str
    reduction: str
    estimator: str
    pair_hash: str
    model: str
    view: str
    seed: int | None = None
    control: Control | None = None

    def check_refreshed_by(self, fresh: "Provenance") -> None:
        """Raise `RefreshError` unless directions of this origin can be updated with those of the origin `fresh`."""
        same = ["source", "feature", "reduction", "pair_hash", "model"]
        # A control takes the real thing and makes itself of it; a random one of whatever estimator.
        if fresh.control is not None:
            same += ["estimator", "control", "seed"]
        elif self.estimator != "random":
            same += ["estimator"]
        for name in same:
            if getattr(self, name) != getattr(fresh, name):
                raise RefreshError(
                    f"`fresh` should have the {name} of the directions it refreshes, {getattr(self, name)!r}. "
                    f"Found {getattr(fresh, name)!r}. Fix: extract from the same pairs and model, as before."
                )


class Capture(Mapping[str, Tensor]):
    """Features by module name, each (rows, d_feature) in float32 or wider.

    `capture_activations` and `capture_gradients` make it. It remembers their settings, the `view` of the model (as
    `RoutedLayer.view` names it) and, for products with `directions`, these and their version. Reading raises
    GradRouteError where a module did not run or is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: tuple[Source, Feature, Reduction],
        modules: Sequence[str],
        directions: Any = None,
    ) -> None:
        self.settings = settings
        self.source, self.feature, self.reduction = settings
        self.view: str | None = None
        self.directions, self.version = directions, None if directions is None else directions.version
        self._model: nn.Module | str = model
        self._forwards: dict[str, list[Tensor | None]] = {name: [] for name in modules}
        self._last: dict[str, int] = {}
        self._joined: dict[str, Tensor] | None = None

    def __getitem__(self, module: str) -> Float[Tensor, "rows d_feature"]:
        if self._joined is None:
            self._joined = self._join()
        return self._joined[module]

    def __iter__(self) -> Iterator[str]:
        return iter(self._forwards)

    def __len__(self) -> int:
        return len(self._forwards)

    def __repr__(self) -> str:
        forwards = max((len(slots) for slots in self._forwards.values()), default=0)
        view = "" if self.view is None else f", {self.view} view"
        return f"Capture({self.source}, {self.feature}, {len(self)} modules, {forwards} forwards{view})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": self.model}

    @property
    def model(self) -> str:
        """Identity of the base model that was read."""
        if not isinstance(self._model, str):
            self._model = known_identity(self._model)
        return self._model

    def check_fits(self, directions: Any, view: str | None) -> None:
        """Raise unless these features were taken like those of the pairs: settings, view and base model.

        Args:
            directions: `Directions` that are to score these features.
            view: the view that these features should be in; None for that of the directions.
        """
        provenance: Provenance = directions.provenance
        expected = (provenance.source, provenance.feature, provenance.reduction)
        if self.settings != expected:
            raise GradRouteError(
                f"`features` should be captured as {expected}, like the pairs. Found {self.settings}. Fix: capture "
                "with the settings that the directions were extracted with."
            )
        if view is None and self.view != provenance.view:
            raise GradRouteError(
                f"`features` should be captured in the view of the directions, {provenance.view!r}. "
                f"Found {self.view!r}. Fix: extract and capture under the same `with ablate_quarantine(model):`, or "
                f"pass view={self.view!r} to `score` if the views differ on purpose."
            )
        if view is not None and self.view != view:
            raise GradRouteError(f"`features` should be captured in the given view, {view!r}. Found {self.view!r}.")
        if self.model != provenance.model:
            raise GradRouteError(
                "`features` should be captured from the base model that the directions were extracted from. Found "
                "another one, or other values in its frozen weights. Fix: extract from the model that is scored."
            )
        if self.directions is not None and (self.directions is not directions or self.version != directions.version):
            other = "other directions" if self.directions is not directions else f"version {self.version} of these"
            raise GradRouteError(
                f"`features` should be captured with these directions in version {directions.version}. Found {other}. "
                "Fix: capture and score between two refreshes."
            )

    def as_view(self, view: str) -> "Capture":
        """The same features, taken on purpose for those of another view: a gate compares them with its directions.

        Args:
            view: that of the directions, such as "ablated".
        """
        taken = copy(self)
        taken.view = view
        return taken

    def take(self, rows: Int[Tensor, " chosen"]) -> "Capture":
        """The same features, of some of the rows."""
        taken = copy(self)
        taken._forwards = {name: [features[rows]] for name, features in self.items()}
        taken._joined = None
        return taken

    def open_slot(self, module: str, view: str, forward: int | None = None) -> int:
        """Reserve the next place in the order of forwards.

        Args:
            module: the module that runs.
            view: the view that the model is in.
            forward: number of the model's forward that runs now; None for a module that is called alone.

        Raises:
            GradRouteError: the module ran before in this forward, or an earlier forward was in another view.
        """
        if forward is not None and self._last.get(module) == forward:
            raise GradRouteError(
                f"`{module}` should run once in a forward, a row per rollout. Found a second run: blocks share it, or "
                "a forward runs several batches. Fix: `modules=[...]` that run once, or a capture for each batch."
            )
        if self.view not in (None, view):
            raise GradRouteError(
                f"All forwards of a capture should be in one view. Found {self.view!r}, then {view!r} in `{module}`. "
                "Fix: a capture for each view."
            )
        self.view, self._joined = view, None
        if forward is not None:
            self._last[module] = forward
        self._forwards[module].append(None)
        return len(self._forwards[module]) - 1

    def fill(self, module: str, slot: int, rows: Tensor) -> None:
        """Put the rows of one forward in their place; a second backward through it adds to them."""
        self._joined = None
        before = self._forwards[module][slot]
        self._forwards[module][slot] = rows if before is None else before + rows

    def finish(self) -> None:
        """Join the forwards now, so that what is missing raises at the end of the block and not at a later use."""
        self._joined = self._join()

    def _join(self) -> dict[str, Tensor]:
        verb = "run forward" if self.source == "activation" else "run forward and backward"
        idle = [name for name, slots in self._forwards.items() if not slots or any(rows is None for rows in slots)]
        if idle:
            raise GradRouteError(
                f"Every captured module should have {verb} inside the block. Found that these did not: {listed(idle)}."
            )
        joined = {name: torch.cat([r for r in slots if r is not None]) for name, slots in self._forwards.items()}
        counts = {name: rows.shape[0] for name, rows in joined.items()}
        if len(set(counts.values())) > 1:
            raise GradRouteError(f"Every captured module should see the same rollouts. Found rows per module {counts}.")
        finite = read_together(torch.isfinite(rows).all() for rows in joined.values())
        for (name, rows), is_finite in zip(joined.items(), finite, strict=True):
            if not is_finite:
                row = (~torch.isfinite(rows)).any(1).nonzero()[0].item()
                raise GradRouteError(f"The {self.source} features of `{name}` are not finite in row {row}.")
        return joined
