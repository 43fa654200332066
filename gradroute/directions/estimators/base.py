"""The base of all estimators of directions: they hold pairs out, refuse dead directions and return unit rows.

    v <- v / |v|

A direction of zero norm raises: an epsilon in the division would make it an arbitrary one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gradroute._checks import listed
from gradroute._transfers import read_together
from gradroute.directions._reading import without_autocast
from gradroute.errors import DeadDirectionError, GradRouteError

Features = Mapping[str, Float[Tensor, "pairs _"]]
Vectors = dict[str, Float[Tensor, " _"]]

DEAD = 1e-6
"""Below this share of the features' own norm a difference is rounding noise of a float32 forward."""

Unnormalised = tuple[dict[str, Float[Tensor, "_ _"]], Vectors | None, Vectors | None]
"""(rows of any norm, centre, scale); a row of zeros where there is no direction."""


class Estimate(NamedTuple):
    """Unit rows per module, centre and scale of the features that they are for, and the pairs that were left out."""

    rows: Mapping[str, Float[Tensor, "_ _"]]
    centre: Mapping[str, Float[Tensor, " _"]] | None
    scale: Mapping[str, Float[Tensor, " _"]] | None
    heldout: tuple[int, ...]

    def coordinates(self, module: str, features: Float[Tensor, "n d_feature"]) -> Float[Tensor, "n d_feature"]:
        """(f - c) / s, in the dtype and on the device of the features."""
        if self.centre is not None:
            features = features - self.centre[module].to(features)
        return features if self.scale is None else features / self.scale[module].to(features)

    def score(self, features: Mapping[str, Float[Tensor, "_ _"]], projected: bool = False) -> Float[Tensor, " n"]:
        """Sum over modules and rows v of <v, (f - c) / s>; `projected` features hold sum over v of <v, f / s> already.

        Raises:
            GradRouteError: a module is missing, or has another width or number of rows.
        """
        total: Tensor | None = None
        for name, rows in self.rows.items():
            if name not in features:
                raise GradRouteError(
                    f"`features` lacks the module `{name}`. Found {sorted(features)[:5]}. Fix: capture from the model "
                    "that the directions came from, wrapped as it was then: DDP's wrapper adds `module.` to names."
                )
            f = features[name].detach()
            width = 1 if projected else rows.shape[-1]
            if f.shape[-1] != width:
                raise GradRouteError(f"`features` of `{name}` should be {width} wide. Found {f.shape[-1]}.")
            v = rows.to(f).sum(0)
            with without_autocast(f.device):
                if projected:
                    part = f[:, 0] + self.coordinates(name, torch.zeros_like(v)[None]) @ v
                else:
                    part = self.coordinates(name, f) @ v
            if total is not None and total.shape != part.shape:
                raise GradRouteError(f"`features` should have {len(total)} rows in `{name}` too. Found {len(part)}.")
            total = part if total is None else total + part.to(total.device)
        assert total is not None
        return total


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """Callable: (features of the hack sides, features of the clean sides) -> `Estimate`.

    Args:
        n_heldout: pairs that are kept out of the estimate, for `Directions.summary`.
        seed: of their choice.
    """

    name: ClassVar[str]
    least_pairs: ClassVar[int] = 1
    n_heldout: int = 0
    seed: int = 0

    def __call__(self, hack: Features, clean: Features) -> Estimate:
        """Unit rows from the pairs that are not held out.

        Raises:
            DeadDirectionError: a module in which the sides do not differ.
            GradRouteError: too few pairs.
        """
        pairs = len(next(iter(hack.values())))
        left = pairs - self.n_heldout
        if self.n_heldout < 0 or left < self.least_pairs:
            raise GradRouteError(
                f"`{self.name}` should have {self.least_pairs} or more pairs to estimate from. Found {pairs} pairs, "
                f"{self.n_heldout} of them held out. Fix: more pairs, or a smaller `n_heldout`."
            )
        order = torch.randperm(pairs, generator=torch.Generator().manual_seed(self.seed))
        heldout = tuple(sorted(order[: self.n_heldout].tolist()))
        kept = sorted(order[self.n_heldout :].tolist())
        if heldout:
            index = {device: torch.tensor(kept, device=device) for device in {f.device for f in hack.values()}}
            hack, clean = ({name: f[index[f.device]] for name, f in side.items()} for side in (hack, clean))
        rows, centre, scale = self.estimate(hack, clean)
        alive = read_together(v.any(1).all() for v in rows.values())
        dead = [name for name, is_alive in zip(rows, alive, strict=True) if not is_alive]
        if dead:
            raise DeadDirectionError(
                f"Hack and clean sides have the same features in {len(dead)} of {len(hack)} modules: {listed(dead)}."
            )
        return Estimate({name: unit(v) for name, v in rows.items()}, centre, self.normalise(rows, scale), heldout)

    @abstractmethod
    def estimate(self, hack: Features, clean: Features) -> Unnormalised:
        """The formula, on the pairs that are not held out."""

    def normalise(self, rows: dict[str, Float[Tensor, "_ _"]], scale: Vectors | None) -> Vectors | None:  # noqa: ARG002
        """The scale that goes with unit rows: unchanged, as each module's norm is dropped."""
        return scale

    def __str__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        settings = [f"{f.name}={values[f.name]!r}" for f in fields(self) if values[f.name] != f.default]
        return f"{self.name}({', '.join(settings)})" if settings else self.name


def standardisation(hack: Features, clean: Features) -> tuple[Vectors, Vectors]:
    """(c, s): mean and standard deviation of each coordinate over both sides of the pairs."""
    centre, scale = {}, {}
    for name in hack:
        f = torch.cat([hack[name], clean[name]])
        centre[name], s = f.mean(0), f.std(0, correction=0)
        size = f.square().mean().sqrt()
        # A coordinate that does not vary but for rounding would become pure noise of unit variance.
        scale[name] = torch.where(s > DEAD * size, s, torch.where(size > 0, size, 1.0))
    return centre, scale


def unit(rows: Float[Tensor, "*k d_feature"]) -> Float[Tensor, "*k d_feature"]:
    """Each row over its norm; the caller has made sure that no row is zero."""
    lengths: Tensor = rows.norm(dim=-1, keepdim=True)
    return rows / lengths


def noise(hack: Float[Tensor, "pairs d"], clean: Float[Tensor, "pairs d"]) -> Float[Tensor, ""]:
    """The norm below which a difference of the features is rounding noise: `DEAD` times their mean norm."""
    size: Tensor = torch.cat([hack, clean]).norm(dim=1).mean()
    return DEAD * size
