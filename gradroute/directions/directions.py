"""Directions: k rows per module that point from clean to hack features, with the features that they were made of.

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
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._checks import instance_of
from gradroute._hashing import model_identity, rows_hash
from gradroute._transfers import moved_together, read_together
from gradroute._typing import typechecked
from gradroute.directions._draws import RANDOM, Draw, Sides, sides
from gradroute.directions._io import incomplete, read_directions, write_directions
from gradroute.directions.estimators.base import Estimate, Estimator, unit
from gradroute.directions.estimators.by_name import as_estimator
from gradroute.directions.features import Capture, Provenance
from gradroute.directions.made_once import estimate_on
from gradroute.errors import FileFormatError, GradRouteError, RefreshError


@dataclass(eq=False)
class Directions:
    """k unit rows per module, and the pooled features of the pairs they came from.

    Args:
        rows: module name -> (k, d_feature), in module order; modules without rows do not count in the score.
        hack, clean: module name -> (pairs, d_feature).
        provenance: where they come from.
        version, step: raised by one at each `update_`; optimizer step at which they were last extracted.
        centre, scale: module name -> (d_feature,), for rows that are taken with standardised features.
        heldout: the pairs that the rows were estimated without.
        estimator: of the rows; None reads it from the provenance.

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
        checked: list[tuple[str, Tensor]] = []
        for name, rows in self.rows.items():
            found = [rows, self.hack[name], self.clean[name]]
            found += [group[name] for group in (self.centre, self.scale) if group is not None]
            widths = {t.shape[-1] for t in found}
            if rows.ndim != 2 or len(widths) > 1:
                raise GradRouteError(f"Rows and pair features of `{name}` should be as wide. Found {sorted(widths)}.")
            finite = f"Rows and pair features of `{name}` should be finite."
            checked += [(finite, torch.isfinite(t).all()) for t in found]
            checked.append((f"`rows` of `{name}` should be unit vectors. Found a row of zeros.", rows.any(1).all()))
            if self.scale is not None:
                checked.append((f"`scale` of `{name}` should be positive.", (self.scale[name] > 0).all()))
        for (message, _), holds in zip(checked, read_together(flag for _, flag in checked), strict=True):
            if not holds:
                raise GradRouteError(message)

    def __repr__(self) -> str:
        ks = sorted({len(rows) for rows in self.rows.values()})
        k, d = "-".join(map(str, ks[:1] + ks[1:][-1:])), next(iter(self.rows.values())).shape[1]
        origin = self.provenance
        control = "" if origin.control in (None, "random") else f"{origin.control} control, "
        heldout = f" ({len(self.heldout)} held out)" if self.heldout else ""
        return (
            f"Directions({control}{origin.estimator} of {origin.source} {origin.feature}, {len(self.rows)} modules x "
            f"{k} x {d}, {self.n_pairs} pairs{heldout} {origin.pair_hash[:8]}, {origin.view} view, step {self.step}, "
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
    def score(self, features: Mapping[str, Float[Tensor, "_ _"]], *, view: str | None = None) -> Float[Tensor, " rows"]:
        """Sum over modules and rows v of <v, (f - c) / s>: a float per rollout, large where it looks like a hack.

        Args:
            features: module name -> (rows, d_feature), as captured with the settings of these directions. A `Capture`
                is checked, a plain mapping is taken as it is.
            view: the view of the model in which a `Capture` was taken, where it differs from that of the directions on
                purpose; None means the view of the directions.

        Raises:
            GradRouteError: a module is missing or has another width; or a `Capture` was taken with other settings, in
                another view, of another base model, or for other directions or another version of these.
        """
        projected = isinstance(features, Capture) and features.directions is not None
        if isinstance(features, Capture):
            features.check_fits(self, view)
        elif view is not None:
            raise GradRouteError(
                f"`view` should come with a Capture, which knows its view. Found {view!r} and a "
                f"{type(features).__name__}. Fix: score the Capture itself, or leave `view` out."
            )
        devices = {name: features[name].device for name in self.rows if name in features}
        return estimate_on(self, devices).score(features, projected)

    def weights(self) -> dict[str, Float[Tensor, " _"]]:
        """Module name -> sum over rows of v / s: what features are multiplied with in a score."""
        sums = {name: rows.sum(0) for name, rows in self.rows.items()}
        return sums if self.scale is None else {name: v / self.scale[name] for name, v in sums.items()}

    def pair_scores(self) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """(hack, clean): the score of each side of each pair; of a control's own sides."""
        hack, clean = self.sides
        return self.score(hack), self.score(clean)

    @property
    def sides(self) -> Sides:
        """(hack, clean): the pair features that play these sides; of a control, its own."""
        return sides(self.hack, self.clean, self.provenance.control, self.provenance.seed)

    @property
    def estimate(self) -> Estimate:
        """Rows, centre, scale and held-out pairs, without what they were made of."""
        return Estimate(self.rows, self.centre, self.scale, self.heldout)

    @property
    def known_estimator(self) -> Estimator | None:
        """The estimator of the rows; None for random rows, and for a user's estimator that a file cannot name."""
        if self.estimator is not None or self.provenance.control in RANDOM:
            return self.estimator
        try:
            return as_estimator(self.provenance.estimator)
        except GradRouteError:
            return None

    def differences(self) -> dict[str, Float[Tensor, "pairs d_feature"]]:
        """Module name -> f_hack - f_clean, a row per pair.

        Of directions extracted with `features="input"` these are the paired input differences (pairs, d_in) that
        `init.contrastive_covariance_` and `init.signed_seed_` take.
        """
        return {name: self.hack[name] - self.clean[name] for name in self.hack}

    @typechecked
    def random_like(self, seed: int, *, oriented: bool = False) -> "Directions":
        """A control: Haar-distributed orthonormal rows of the same shapes, with the same pair features.

        A gate on it is calibrated on the same pairs. `oriented` also turns each row of each module so that it scores
        the hack sides above the clean ones. A refresh renews the pair features (and the signs) and keeps the rows. See
        `gradroute.directions.controls` for the other controls.
        """
        return self.control(Draw("random-oriented" if oriented else "random", seed))

    def control(self, draw: Draw) -> "Directions":
        """The control that `draw` makes of these directions."""
        if self.provenance.control is not None:
            found = self.provenance.control
            raise GradRouteError(f"A control should be made from real directions. Found a {found} one.")
        estimator = self.known_estimator
        estimate = draw.estimate(self.estimate, self.hack, self.clean, estimator)
        changes: dict[str, Any] = {"control": draw.control, "seed": draw.seed}
        if draw.control in RANDOM:
            changes["estimator"], estimator = "random", None
        origin = dataclasses.replace(self.provenance, **changes)
        return dataclasses.replace(self, provenance=origin, version=0, estimator=estimator, **estimate._asdict())

    @typechecked
    def overlap(self, other: "Directions") -> float:
        """Mean over modules of tr(V W^T) / k: 1 for the same directions, 0 for unrelated, -1 for reversed ones."""
        self._check_same_features(other)
        overlaps = []
        for name in [name for name in self.rows if name in other.rows]:
            V, W = self.rows[name], other.rows[name].to(self.rows[name])
            shared = min(len(V), len(W))  # rows that only one side has overlap with nothing
            overlaps.append((unit(V[:shared]) * unit(W[:shared])).sum() / max(len(V), len(W)))
        return float(sum(read_together(overlaps))) / len(self.rows.keys() | other.rows.keys())

    @typechecked
    def principal_angles(self, other: "Directions") -> dict[str, Float[Tensor, " _"]]:
        """Module name -> angles in radians between the spans of both directions' rows, smallest first."""
        self._check_same_features(other)
        shared = [name for name in self.rows if name in other.rows]
        # On the CPU, in float64: MPS has none.
        V, W = (moved_together([each.rows[name] for name in shared], torch.device("cpu")) for each in (self, other))
        return {name: principal_angles(v, w) for name, v, w in zip(shared, V, W, strict=True)}

    @typechecked
    def update_(self, fresh: "Directions", *, step: int) -> "Directions":
        """Take over rows and pair features of `fresh` in place; every gate that holds these directions sees them.

        A control renews itself from fresh real directions: random rows stay (and are turned again if oriented),
        shuffled and placebo rows are estimated again with the same draw, reversed rows are negated again.

        Raises:
            RefreshError: `fresh` is this very object, or was made from other pairs, settings, modules or another base.
        """
        if fresh is self:
            raise RefreshError("`fresh` should be another extraction. Found the very object to be updated.")
        self._check_same_features(fresh)
        self.provenance.check_refreshed_by(fresh.provenance)
        control, view = self.provenance.control, fresh.provenance.view
        if control is not None and fresh.provenance.control is None:
            fresh = fresh.control(Draw(control, self.provenance.seed, self.rows))
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

    def _check_same_features(self, other: "Directions") -> None:
        instance_of("other", other, Directions)
        mine, theirs = ({n: f.shape[1] for n, f in directions.hack.items()} for directions in (self, other))
        if mine != theirs:
            different = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            raise RefreshError(
                f"Both directions should have the same modules and shapes. Different: {different[:5]}. Fix: extract "
                "from the same model, always with its wrapper or always without (DDP's adds `module.` to every name)."
            )


def principal_angles(V: Float[Tensor, "k d"], W: Float[Tensor, "l d"]) -> Float[Tensor, " n"]:
    """arccos of the singular values of Q_V^T Q_W, smallest first; min(k, l) angles between 0 and pi / 2.

    The rows are on a device with float64.
    """
    Q_V, Q_W = (torch.linalg.qr(rows.double().T).Q for rows in (V, W))
    angles: Tensor = torch.linalg.svdvals(Q_V.T @ Q_W).clamp(max=1).arccos()
    return angles
