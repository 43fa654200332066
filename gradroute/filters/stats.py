"""Figures of what a filter found in a gradient and left in it; they mean something only against those of chance.

    cin = |relu(V g)| / |g|  (one-sided)  or  |V g| / |g|  (two-sided);     cout: the same of what is left of g
    null = sqrt(k / 2d)      (one-sided)  or  sqrt(k / d)  (two-sided):     cin of random V, in root mean square

V has k orthonormal rows of width d: d = r for gains, r (d_in + d_out) for LoRA matrices. Source: grpo_proj2 (wassname).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from gradroute.errors import GradRouteError

Sided = Literal["one", "two"]


@dataclass(frozen=True)
class HackwardShare:
    """Figures of one module, of one source of rollouts, or of all of them pooled.

    Args:
        cin, cout: share of the gradient that is hack-ward, before and after; 0 where there is no gradient.
        null: cin of a random direction. Pooled, each module weighs by its squared gradient.
        fired: share of directions, or of rollouts, of which something was taken out (would be, when measuring).
        residual: |removed + kept - g| / |g|.
    """

    cin: float
    cout: float
    null: float
    fired: float
    residual: float


@dataclass(frozen=True, repr=False)
class FilterStats:
    """Figures of one application of a filter.

    Args:
        sided: whether cin, cout and null are one-sided or two-sided.
        pooled: over all modules.
        modules: by module name.
        sources: by label of the rollouts, if labels were given; pooled over modules.
        kept_bytes: most memory that a `RolloutFilter` kept between backward and decision.
    """

    sided: Sided
    pooled: HackwardShare
    modules: Mapping[str, HackwardShare]
    sources: Mapping[str, HackwardShare] = field(default_factory=dict)
    kept_bytes: int = 0

    @property
    def cin(self) -> float:
        """Pooled hack-ward share before."""
        return self.pooled.cin

    @property
    def cout(self) -> float:
        """Pooled hack-ward share after."""
        return self.pooled.cout

    @property
    def null(self) -> float:
        """Pooled cin of random directions."""
        return self.pooled.null

    @property
    def fired(self) -> float:
        """Pooled share of directions or rollouts that fired."""
        return self.pooled.fired

    @property
    def residual(self) -> float:
        """Pooled |removed + kept - g| / |g|."""
        return self.pooled.residual

    def __repr__(self) -> str:
        text = (
            f"FilterStats({self.sided}-sided cin {self.cin:.3f} -> {self.cout:.3f} (random {self.null:.3f}), "
            f"fired {self.fired:.2f}, residual {self.residual:.1g}, {len(self.modules)} modules"
        )
        for source, share in self.sources.items():
            text += f"; {source} {share.cin:.3f} -> {share.cout:.3f}, fired {share.fired:.2f}"
        return f"{text}; kept {self.kept_bytes:,d} bytes)" if self.kept_bytes else f"{text})"


class SquaredNorms(NamedTuple):
    """Squared norms of one module's gradient g and of what is left of it, and the squared null.

    `residual` is to be seen relative to `whole`, |g|^2: the same as `gradient_in` unless cin is measured on features.
    """

    hack_in: Float[Tensor, ""]
    gradient_in: Float[Tensor, ""]
    hack_out: Float[Tensor, ""]
    gradient_out: Float[Tensor, ""]
    residual: Float[Tensor, ""]
    whole: Float[Tensor, ""]
    fired: Float[Tensor, ""]
    null: float


def squared_norms(
    before: Float[Tensor, " d"],
    kept: Float[Tensor, " d"],
    removed: Float[Tensor, " d"],
    V: Float[Tensor, "k d"],
    *,
    sided: Sided,
    fired: Float[Tensor, ""],
) -> SquaredNorms:
    """The ingredients of cin, cout and residual of one module, left on its device."""

    def hackward(gradient: Tensor) -> Tensor:
        c = V @ gradient
        return (c.clamp(min=0) if sided == "one" else c).square().sum()

    k, d = V.shape
    whole = before.square().sum()
    return SquaredNorms(
        hackward(before), whole, hackward(kept), kept.square().sum(), (kept + removed - before).square().sum(), whole,
        fired, k / (2 * d if sided == "one" else d),
    )  # fmt: skip


def shares(norms: Mapping[str, SquaredNorms]) -> tuple[HackwardShare, dict[str, HackwardShare]]:
    """(pooled, by module) of the norms of every module, in one transfer from the device.

    Raises:
        GradRouteError: a gradient that is not finite.
    """
    device = next(iter(norms.values())).fired.device
    rows = torch.stack([torch.stack([t.to(device) for t in n[:-1]]) for n in norms.values()]).cpu().double().tolist()
    for name, row in zip(norms, rows, strict=True):
        if not all(math.isfinite(value) for value in row):
            raise GradRouteError(f"The deployed gradient of `{name}` is not finite. Fix: skip this step.")
    nulls = [n.null for n in norms.values()]
    modules = {name: _share([row], [null]) for name, row, null in zip(norms, rows, nulls, strict=True)}
    return _share(rows, nulls), modules


def _share(rows: Sequence[Sequence[float]], nulls: Sequence[float]) -> HackwardShare:
    hack_in, gradient_in, hack_out, gradient_out, residual, whole, fired = map(sum, zip(*rows, strict=True))
    weighted = sum(null * row[1] for null, row in zip(nulls, rows, strict=True))
    return HackwardShare(
        cin=_ratio(hack_in, gradient_in),
        cout=_ratio(hack_out, gradient_out),
        null=_ratio(weighted, gradient_in) if gradient_in else math.sqrt(sum(nulls) / len(nulls)),
        fired=fired / len(rows),
        residual=_ratio(residual, whole),
    )


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0
