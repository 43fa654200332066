"""Directions: k rows per module that point from clean to hack features, with what they were made of.

    score(f) = sum over modules, sum over rows v:  <v, f>

They always carry the pooled features of every pair, so that a gate can be calibrated, a control drawn and a refresh
checked without running the model again.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gradroute.directions.capture import Capture
from gradroute.directions.identity import model_identity
from gradroute.errors import FileFormatError, GradRouteError, RefreshError
from gradroute.typing import typechecked

_FORMAT = "gradroute-directions-1"


@dataclass(frozen=True)
class Provenance:
    """How directions came about.

    Args:
        source: "activation" or "gradient".
        feature, reduction: see `capture_activations`.
        estimator: "mean_difference", or "random" for a control that keeps its rows when it is refreshed.
        pair_hash: SHA-256 of the pairs.
        model: identity of the frozen base model.
        view: the view of the model that was measured: "on", "ablated", "scaled" or "disabled".
        seed: of a random control.
    """

    source: str
    feature: str
    reduction: str
    estimator: str
    pair_hash: str
    model: str
    view: str
    seed: int | None = None


@dataclass(eq=False)
class Directions:
    """k unit rows per module, and the pooled features of the pairs they came from.

    Args:
        rows: module name -> (k, d_feature), in module order.
        hack, clean: module name -> (pairs, d_feature).
        provenance: how they were made.
        version: raised by one at each `update_`.
        step: optimizer step at which they were last extracted.
    """

    rows: Mapping[str, Float[Tensor, "_ _"]]
    hack: Mapping[str, Float[Tensor, "_ _"]]
    clean: Mapping[str, Float[Tensor, "_ _"]]
    provenance: Provenance
    version: int = 0
    step: int = field(default=0)

    def __post_init__(self) -> None:
        self.rows, self.hack, self.clean = dict(self.rows), dict(self.hack), dict(self.clean)
        if not self.rows:
            raise GradRouteError("`rows` should name at least one module. Found none.")
        if not list(self.rows) == list(self.hack) == list(self.clean):
            raise GradRouteError("`rows`, `hack` and `clean` should name the same modules in the same order.")
        pairs = {features[name].shape[0] for features in (self.hack, self.clean) for name in features}
        if len(pairs) > 1 or pairs == {0}:
            raise GradRouteError(f"`hack` and `clean` should hold one row per pair. Found {sorted(pairs)} rows.")
        for name, rows in self.rows.items():
            widths = {t.shape[-1] for t in (rows, self.hack[name], self.clean[name])}
            if rows.ndim != 2 or len(widths) > 1:
                raise GradRouteError(f"Rows and pair features of `{name}` should be as wide. Found {sorted(widths)}.")
            if not all(torch.isfinite(t).all() for t in (rows, self.hack[name], self.clean[name])):
                raise GradRouteError(f"Rows and pair features of `{name}` should be finite.")
            if not rows.any(1).all():
                raise GradRouteError(f"`rows` of `{name}` should be unit vectors. Found a row of zeros.")

    def __repr__(self) -> str:
        k, d = next(iter(self.rows.values())).shape
        made = self.provenance
        return (
            f"Directions({made.estimator} of {made.source} {made.feature}, {len(self.rows)} modules x {k} x {d}, "
            f"{self.n_pairs} pairs {made.pair_hash[:8]}, {made.view} view, step {self.step}, version {self.version})"
        )

    @property
    def n_pairs(self) -> int:
        """Number of contrastive pairs."""
        return next(iter(self.hack.values())).shape[0]

    @typechecked
    def score(self, features: Mapping[str, Float[Tensor, "_ _"]]) -> Float[Tensor, " rows"]:
        """Sum over modules and rows v of <v, f>: a float per rollout, large where it looks like a hack.

        Args:
            features: module name -> (rows, d_feature), as captured with the settings of these directions.

        Raises:
            GradRouteError: a module is missing, has another width, or was captured with other settings.
        """
        if isinstance(features, Capture):
            found = (features.source, features.feature, features.reduction)
            expected = (self.provenance.source, self.provenance.feature, self.provenance.reduction)
            if found != expected:
                raise GradRouteError(f"`features` should be captured as {expected}, like the pairs. Found {found}.")
        total: Tensor | None = None
        for name, rows in self.rows.items():
            if name not in features:
                raise GradRouteError(f"`features` lacks the module `{name}`. Found {sorted(features)[:5]}.")
            found_rows = features[name]
            if found_rows.shape[-1] != rows.shape[-1]:
                raise GradRouteError(
                    f"`features` of `{name}` should be {rows.shape[-1]} wide. Found {found_rows.shape[-1]}."
                )
            part = found_rows.detach() @ rows.to(found_rows).sum(0)
            if total is not None and total.shape != part.shape:
                raise GradRouteError(f"`features` should have {len(total)} rows in `{name}` too. Found {len(part)}.")
            total = part if total is None else total + part.to(total.device)
        assert total is not None
        return total

    def pair_scores(self) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """(hack, clean): the score of each side of each pair."""
        return self.score(self.hack), self.score(self.clean)

    def differences(self) -> dict[str, Float[Tensor, "pairs d_feature"]]:
        """Module name -> f_hack - f_clean, a row per pair.

        Of directions extracted with `features="input"` these are the paired input differences (pairs, d_in) that
        `init.contrastive_covariance_` and `init.signed_seed_` take.
        """
        return {name: self.hack[name] - self.clean[name] for name in self.rows}

    @typechecked
    def random_like(self, seed: int) -> "Directions":
        """A control: Haar-distributed orthonormal rows of the same shapes, with the same pair features.

        A gate calibrated on it is oriented on the same pairs; a refresh renews its pair features and keeps its rows.
        """
        generator = torch.Generator().manual_seed(seed)
        rows = {}
        for name, own in self.rows.items():
            gauss = torch.randn(own.shape[1], own.shape[0], generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(gauss)
            # The sign of R's diagonal is fixed by convention; undoing it makes Q Haar-distributed.
            rows[name] = (q * torch.sign(torch.diagonal(r))).T.to(own).contiguous()
        provenance = dataclasses.replace(self.provenance, estimator="random", seed=seed)
        return Directions(rows, self.hack, self.clean, provenance, step=self.step)

    @typechecked
    def overlap(self, other: "Directions") -> float:
        """Mean over modules of tr(V W^T) / k: 1 for the same directions, 0 for unrelated, -1 for reversed ones."""
        self._check_same_shapes(other)
        cosines = [
            (unit(rows) * unit(other.rows[name].to(rows))).sum(-1).mean().item() for name, rows in self.rows.items()
        ]
        return sum(cosines) / len(cosines)

    @typechecked
    def update_(self, fresh: "Directions", *, step: int) -> "Directions":
        """Take over rows and pair features of `fresh` in place; every gate that holds these directions sees them.

        A random control takes the pair features and keeps its rows.

        Raises:
            RefreshError: `fresh` is this very object, or was made from other pairs, settings, modules or another base.
        """
        if fresh is self:
            raise RefreshError("`fresh` is the very object to be updated, so nothing was extracted.")
        self._check_same_shapes(fresh)
        mine, other = self.provenance, fresh.provenance
        for name in ("source", "feature", "reduction", "pair_hash", "model"):
            if getattr(mine, name) != getattr(other, name):
                raise RefreshError(
                    f"`fresh` should have the {name} of the directions it refreshes, {getattr(mine, name)!r}. "
                    f"Found {getattr(other, name)!r}."
                )
        if mine.estimator not in ("random", other.estimator):
            raise RefreshError(
                f"`fresh` should have the estimator of the directions it refreshes, {mine.estimator!r}. "
                f"Found {other.estimator!r}."
            )
        if mine.estimator != "random":
            self.rows = dict(fresh.rows)
        self.hack, self.clean = dict(fresh.hack), dict(fresh.clean)
        self.provenance = dataclasses.replace(mine, view=other.view)
        self.step = step
        self.version += 1
        return self

    def _check_same_shapes(self, other: "Directions") -> None:
        mine = {name: tuple(rows.shape) for name, rows in self.rows.items()}
        theirs = {name: tuple(rows.shape) for name, rows in other.rows.items()}
        if mine != theirs:
            different = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
            raise RefreshError(f"Both directions should have the same modules and shapes. Different: {different[:5]}.")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: rows, pair features, provenance, version and step."""
        tensors = {
            f"{kind}/{name}": values.detach().cpu().contiguous().clone()
            for kind, group in (("rows", self.rows), ("hack", self.hack), ("clean", self.clean))
            for name, values in group.items()
        }
        header = {
            "format": _FORMAT,
            "modules": list(self.rows),
            "provenance": dataclasses.asdict(self.provenance),
            "version": self.version,
            "step": self.step,
        }
        save_file(tensors, str(path), metadata={"gradroute": json.dumps(header)})

    @classmethod
    def load(cls, path: str | Path, *, model: nn.Module | None = None) -> "Directions":
        """Read what `save` wrote.

        Args:
            path: the file.
            model: if given, its frozen weights must be those of the model the directions came from.

        Raises:
            FileFormatError: the file is truncated, of another format or version, or belongs to another model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"`path` should be a directions file. Found nothing at {path}.")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("gradroute", "{}"))
                if header.get("format") != _FORMAT:
                    raise FileFormatError(f"{path}: expected the format {_FORMAT}. Found {header.get('format')!r}.")
                rows, hack, clean = (
                    {name: file.get_tensor(f"{kind}/{name}") for name in header["modules"]}
                    for kind in ("rows", "hack", "clean")
                )
            provenance = Provenance(**header["provenance"])
            directions = cls(rows, hack, clean, provenance, version=header["version"], step=header["step"])
        except FileFormatError:
            raise
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, GradRouteError) as error:
            raise FileFormatError(f"{path}: expected a complete directions file ({error}). Is it truncated?") from error
        if model is not None and model_identity(model) != provenance.model:
            raise FileFormatError(f"{path}: these directions were extracted from another base model than `model`.")
        return directions


def unit(rows: Float[Tensor, "*k d_feature"]) -> Float[Tensor, "*k d_feature"]:
    """Each row over its norm; the caller has made sure that no row is zero."""
    lengths: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / lengths
