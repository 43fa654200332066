"""Directions: k rows per module that point from clean to hack features, with what they were made of.

    score(f) = sum over modules, sum over rows v:  <v, (f - c) / s>        c, s: centre and scale, where there are any

They always carry the pooled features of every pair, so that a gate can be calibrated, a control drawn and a refresh
checked without running the model again. For `parameter` features that is 2 pairs x the number of deployed parameters.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gradroute._hashing import model_identity, rows_hash
from gradroute._typing import typechecked
from gradroute.directions import diagnostics
from gradroute.directions._auroc_plot import plot_summary
from gradroute.directions._io import incomplete, read_directions, write_directions
from gradroute.directions.capture import Capture
from gradroute.directions.controls import RANDOM, Control, Draw, Sides, sides
from gradroute.directions.diagnostics import DirectionsSummary, Validation
from gradroute.directions.estimators.base import Estimate, Estimator, unit
from gradroute.directions.estimators.by_name import estimator_of
from gradroute.directions.provenance import Provenance
from gradroute.errors import FileFormatError, GradRouteError, RefreshError

__all__ = ["Directions", "Provenance", "unit"]


@dataclass(eq=False)
class Directions:
    """k unit rows per module, and the pooled features of the pairs they came from.

    Args:
        rows: module name -> (k, d_feature), in module order; modules without rows do not count in the score.
        hack, clean: module name -> (pairs, d_feature).
        provenance: how they were made.
        version, step: raised by one at each `update_`; optimizer step at which they were last extracted.
        centre, scale: module name -> (d_feature,), for rows that are taken with standardised features.
        heldout: the pairs that the rows were estimated without.
        estimator: what made the rows; None reads it from the provenance.

    Raises GradRouteError where these do not fit each other or are not finite.
    """

    rows: Mapping[str, Float[Tensor, "_ _"]]
    hack: Mapping[str, Float[Tensor, "_ _"]]
    clean: Mapping[str, Float[Tensor, "_ _"]]
    provenance: Provenance
    version: int = 0
    step: int = field(default=0)
    centre: Mapping[str, Float[Tensor, " _"]] | None = None
    scale: Mapping[str, Float[Tensor, " _"]] | None = None
    heldout: tuple[int, ...] = ()
    estimator: Estimator | None = None

    def __post_init__(self) -> None:
        self.rows, self.hack, self.clean = dict(self.rows), dict(self.hack), dict(self.clean)
        if not self.rows:
            raise GradRouteError("`rows` should name at least one module. Found none.")
        if not list(self.hack) == list(self.clean) or list(self.rows) != [n for n in self.hack if n in self.rows]:
            raise GradRouteError("`rows`, `hack` and `clean` should name the same modules in the same order.")
        pairs = {features[name].shape[0] for features in (self.hack, self.clean) for name in features}
        if len(pairs) > 1 or pairs == {0}:
            raise GradRouteError(f"`hack` and `clean` should hold one row per pair. Found {sorted(pairs)} rows.")
        for name, rows in self.rows.items():
            found = [rows, self.hack[name], self.clean[name]]
            found += [group[name] for group in (self.centre, self.scale) if group is not None]
            widths = {t.shape[-1] for t in found}
            if rows.ndim != 2 or len(widths) > 1:
                raise GradRouteError(f"Rows and pair features of `{name}` should be as wide. Found {sorted(widths)}.")
            if not all(torch.isfinite(t).all() for t in found):
                raise GradRouteError(f"Rows and pair features of `{name}` should be finite.")
            if not rows.any(1).all():
                raise GradRouteError(f"`rows` of `{name}` should be unit vectors. Found a row of zeros.")
            if self.scale is not None and not (self.scale[name] > 0).all():
                raise GradRouteError(f"`scale` of `{name}` should be positive.")

    def __repr__(self) -> str:
        ks = sorted({len(rows) for rows in self.rows.values()})
        k, d = "-".join(map(str, ks[:1] + ks[1:][-1:])), next(iter(self.rows.values())).shape[1]
        made = self.provenance
        control = "" if made.control in (None, "random") else f"{made.control} control, "
        heldout = f" ({len(self.heldout)} held out)" if self.heldout else ""
        return (
            f"Directions({control}{made.estimator} of {made.source} {made.feature}, {len(self.rows)} modules x {k} x "
            f"{d}, {self.n_pairs} pairs{heldout} {made.pair_hash[:8]}, {made.view} view, step {self.step}, "
            f"version {self.version})"
        )

    @property
    def content_hash(self) -> str:
        """SHA-256 of what scores depend on: rows, centre and scale."""
        return rows_hash({"rows": self.rows, "centre": self.centre, "scale": self.scale})

    @property
    def n_pairs(self) -> int:
        """Number of contrastive pairs."""
        return next(iter(self.hack.values())).shape[0]

    @typechecked
    def score(self, features: Mapping[str, Float[Tensor, "_ _"]]) -> Float[Tensor, " rows"]:
        """Sum over modules and rows v of <v, (f - c) / s>: a float per rollout, large where it looks like a hack.

        Args:
            features: module name -> (rows, d_feature), as captured with the settings of these directions.

        Raises:
            GradRouteError: a module is missing, has another width, or was captured with other settings, or for other
                directions or another version of these.
        """
        made = self.provenance
        projected = isinstance(features, Capture) and features.projected_on(
            self, (made.source, made.feature, made.reduction)
        )
        return self._estimate.score(features, projected)

    def weights(self) -> dict[str, Float[Tensor, " _"]]:
        """Module name -> sum over rows of v / s: what features are multiplied with in a score."""
        return {
            name: rows.sum(0) if self.scale is None else rows.sum(0) / self.scale[name]
            for name, rows in self.rows.items()
        }

    def pair_scores(self) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """(hack, clean): the score of each side of each pair; of a control's own sides."""
        hack, clean = self._sides
        return self.score(hack), self.score(clean)

    def differences(self) -> dict[str, Float[Tensor, "pairs d_feature"]]:
        """Module name -> f_hack - f_clean, a row per pair.

        Of directions extracted with `features="input"` these are the paired input differences (pairs, d_in) that
        `init.contrastive_covariance_` and `init.signed_seed_` take.
        """
        return {name: self.hack[name] - self.clean[name] for name in self.hack}

    @typechecked
    def random_like(self, seed: int, *, oriented: bool = False) -> "Directions":
        """A control: Haar-distributed orthonormal rows of the same shapes, with the same pair features.

        A gate calibrated on it is oriented on the same pairs; `oriented` turns each row of each module besides, so that
        it scores the hack sides above the clean ones. A refresh renews its pair features (and the signs), not its rows.
        """
        return self._control("random-oriented" if oriented else "random", seed)

    @typechecked
    def shuffled(self, seed: int) -> "Directions":
        """A control: estimated from the same pairs, of which half, drawn by `seed`, have their sides swapped."""
        return self._control("shuffled", seed)

    @typechecked
    def placebo(self, seed: int) -> "Directions":
        """A control: estimated from the same rollouts, paired across prompts: hack with hack, clean with clean.

        Authored placebo pairs need no such thing: extract from them as from any others.
        """
        return self._control("placebo", seed)

    def reversed(self) -> "Directions":
        """A control: -v, with the sides of the pairs exchanged, so that a gate routes what looks clean."""
        return self._control("reversed", None)

    def summary(self, previous: "Directions | None" = None, *, seed: int = 0, draws: int = 100) -> DirectionsSummary:
        """A table of diagnostics per module and pooled, on the held-out pairs where there are any; see `diagnostics`.

        Args:
            previous: directions to take principal angles to.
            seed: of the split halves and the random draws.
            draws: number of random draws.
        """
        hack, clean = self._sides
        found = diagnostics.summarise(self._estimate, hack, clean, self._known_estimator(), seed=seed, draws=draws)
        angles = {} if previous is None else self.principal_angles(previous)
        modules = {name: dataclasses.replace(m, angles=angles.get(name)) for name, m in found.modules.items()}
        return dataclasses.replace(found, title=repr(self), modules=modules)

    def plot(self, ax: Any = None) -> tuple[Any, Any]:
        """Draw `summary`: the AUROC of each module and of all; returns (figure, axes). Needs matplotlib."""
        return plot_summary(self.summary(), ax)

    @typechecked
    def validate(
        self, rollouts: Float[Tensor, " rows"] | Mapping[str, Float[Tensor, "_ _"]], labels: Bool[Tensor, " rows"]
    ) -> Validation:
        """AUROC on labelled rollouts, with an interval; warns where it is below 1/2.

        Pairs of another distribution than the rollouts give inverted scores, which look like a working gate.

        Args:
            rollouts: their scores, or their features.
            labels: True for hacks.
        """
        scores = rollouts if isinstance(rollouts, Tensor) else self.score(rollouts)
        return diagnostics.validate_scores(scores, labels)

    @typechecked
    def overlap(self, other: "Directions") -> float:
        """Mean over modules of tr(V W^T) / k: 1 for the same directions, 0 for unrelated, -1 for reversed ones."""
        self._check_same_features(other)
        names = [name for name in self.hack if name in self.rows or name in other.rows]
        return sum(diagnostics.overlap(self.rows.get(name), other.rows.get(name)) for name in names) / len(names)

    @typechecked
    def principal_angles(self, other: "Directions") -> dict[str, Float[Tensor, " _"]]:
        """Module name -> angles in radians between the spans of both directions' rows, smallest first."""
        self._check_same_features(other)
        shared = [name for name in self.rows if name in other.rows]
        return {name: diagnostics.principal_angles(self.rows[name], other.rows[name]) for name in shared}

    @typechecked
    def update_(self, fresh: "Directions", *, step: int) -> "Directions":
        """Take over rows and pair features of `fresh` in place; every gate that holds these directions sees them.

        A control makes itself anew from fresh real directions: random rows stay (turned again if oriented), shuffled
        and placebo ones are estimated again with the same draw, reversed ones negated.

        Raises:
            RefreshError: `fresh` is this very object, or was made from other pairs, settings, modules or another base.
        """
        if fresh is self:
            raise RefreshError("`fresh` should be extracted anew. Found the very object to be updated.")
        self._check_same_features(fresh)
        self.provenance.check_refreshed_by(fresh.provenance)
        control, view = self.provenance.control, fresh.provenance.view
        if control is not None and fresh.provenance.control is None:
            fresh = fresh._control(control, self.provenance.seed, self.rows)
        self.rows, self.hack, self.clean = dict(fresh.rows), dict(fresh.hack), dict(fresh.clean)
        self.centre, self.scale, self.heldout = fresh.centre, fresh.scale, fresh.heldout
        self.estimator = fresh.estimator
        self.provenance = dataclasses.replace(self.provenance, view=view)
        self.step = step
        self.version += 1
        return self

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: rows, pair features, centre and scale, provenance, version and step."""
        groups = {"rows": self.rows, "hack": self.hack, "clean": self.clean, "centre": self.centre, "scale": self.scale}
        header = {"provenance": dataclasses.asdict(self.provenance), "heldout": list(self.heldout),
                  "version": self.version, "step": self.step}  # fmt: skip
        write_directions(path, {kind: group for kind, group in groups.items() if group is not None}, header)

    @classmethod
    def load(cls, path: str | Path, *, model: nn.Module | None = None) -> "Directions":
        """Read what `save` wrote.

        Args:
            path: the file.
            model: if given, its frozen weights must be those of the model the directions came from.

        Raises:
            FileFormatError: the file is truncated, of another format or version, or belongs to another model.
        """
        fields = read_directions(Path(path))
        try:
            directions = cls(**{**fields, "provenance": Provenance(**fields["provenance"])})
        except (TypeError, GradRouteError) as error:
            raise incomplete(path, error) from error
        if model is not None and model_identity(model) != directions.provenance.model:
            raise FileFormatError(f"{path}: these directions were extracted from another base model than `model`.")
        return directions

    @property
    def _estimate(self) -> Estimate:
        return Estimate(self.rows, self.centre, self.scale, self.heldout)

    @property
    def _sides(self) -> Sides:
        return sides(self.hack, self.clean, self.provenance.control, self.provenance.seed)

    def _known_estimator(self) -> Estimator | None:
        if self.estimator is not None or self.provenance.control in RANDOM:
            return self.estimator
        return estimator_of(self.provenance.estimator)

    def _control(self, control: Control, seed: int | None, kept: Mapping[str, Tensor] | None = None) -> "Directions":
        """The control of these directions; random ones with the rows `kept` where they are given."""
        if self.provenance.control is not None:
            found = self.provenance.control
            raise GradRouteError(f"A control should be made from real directions. Found a {found} one.")
        estimator = self._known_estimator()
        estimate = Draw(control, seed, kept).estimate(self._estimate, self.hack, self.clean, estimator)
        changes: dict[str, Any] = {"control": control, "seed": seed}
        if control in RANDOM:
            changes["estimator"], estimator = "random", None
        return Directions(
            estimate.rows, self.hack, self.clean, dataclasses.replace(self.provenance, **changes), step=self.step,
            centre=estimate.centre, scale=estimate.scale, heldout=estimate.heldout, estimator=estimator,
        )  # fmt: skip

    def _check_same_features(self, other: "Directions") -> None:
        mine, theirs = ({n: f.shape[1] for n, f in directions.hack.items()} for directions in (self, other))
        if mine != theirs:
            different = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            raise RefreshError(f"Both directions should have the same modules and shapes. Different: {different[:5]}.")
