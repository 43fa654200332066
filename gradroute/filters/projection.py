"""Take a part out of a gradient, or keep only that: per module, orthonormal rows V (k x d), deployed gradient g (d,).

    c = V g,    c_use = relu(c) ("one")  |  c ("two")  |  2c ("reverse")
    removed = overshoot * c_use V,      kept = g - removed
    erase: g <- kept           route: g <- kept, quarantine's gradient += removed
    keep:  g <- c V            for rows that are trusted, such as those of clean gradients

Which sign is hack-ward? Directions point from clean to hack: v = unit(grad NLL(hack) - grad NLL(clean)). A descent step
p <- p - lr g changes NLL(hack) - NLL(clean) by -lr <v, g> (times |grad NLL(hack) - grad NLL(clean)|). So c > 0 means:
*this step makes the hack likelier than the clean completion*, whatever loss g is the gradient of. A policy-gradient
loss A NLL(rollout) has c > 0 for a hack with A > 0, and for a clean rollout with A < 0; both are hack-ward.

This holds for directions of gradients: `feature="parameter"`, and on gains `feature="bottleneck"`, which is the same
there. (Exactly so for the mean difference; rows of standardised features are divided by their scale, as in a score.) An
activation difference has no sign here, for it does not say which change of a gain makes hacks likelier; it is accepted
on gains as the formula stands, with a `GradRouteWarning` where the sign matters.

In route mode the quarantine gets the removed part in addition to its own gradient, so that no gradient is lost. In the
published scheme it gets nothing else: `route(model, RouteMask.weights(m=1.0, g_d=ones, g_q=0.0))`.
Source: grpo_proj2 (wassname), "erase" and "route v1"; "keep", trusted directions (arXiv:2605.25189).
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._checks import instance_of, one_of, positive_number
from gradroute._per_rollout import block_kind, check_width
from gradroute._protocol import BlockName, RoutedLayer
from gradroute._sharding import as_blocks, as_row, check_layout, full_gradient, size_of, wide
from gradroute._transfers import moved_together
from gradroute.adapters.svd_gain import SvdGain
from gradroute.directions.directions import Directions
from gradroute.directions.made_once import made_once
from gradroute.directions.parameter_rows import check_directions, orthonormal_rows, scaled_rows, warn_without_sign
from gradroute.errors import GradRouteError
from gradroute.filters.base import FilteredGradients, GradientFilter
from gradroute.filters.stats import FilterStats, Sided, SquaredNorms, shares, squared_norms

Mode = Literal["measure", "erase", "route", "keep"]
Side = Literal["one", "two", "reverse"]


class ProjectionFilter(GradientFilter):
    """kept = g - overshoot * c_use V per module; see the module's formulas. Use with `apply_filter` or `attach_filter`.

    Args:
        directions: read at every call, so that a refresh is seen. Rows (k, d): of `feature="parameter"`, d that of the
            flattened gradients of A and B, or of the gain; or of `feature="bottleneck"` on layers with a gain, d = r.
            Rows are orthonormalised in order; rows that are not orthogonal are refused where their signs matter. A
            module whose rows an estimator has dropped keeps its gradient; in mode="keep" it is refused.
        mode: "measure" changes nothing; "erase" drops the hack-ward part; "route" moves it into the gradient of
            `gain_quarantine` (gains without rotation only: there both blocks scale the same axes); "keep" drops all
            that is not along the directions, with side="two".
        side: "one" removes what is hack-ward and leaves what is anti-hack-ward; "two" removes both; "reverse" turns
            both around.
        overshoot: multiple of c_use that is removed; 1 in mode="keep".

    Raises:
        GradRouteError: arguments that contradict each other; when applied: a module without a direction, of another
            width, or without a gradient.
    """

    def __init__(self, directions: Directions, *, mode: Mode, side: Side = "one", overshoot: float = 1.0) -> None:
        provenance = instance_of("directions", directions, Directions).provenance
        if provenance.feature not in ("parameter", "bottleneck"):
            raise GradRouteError(
                f'`directions` should be of feature "parameter" or "bottleneck". Found {provenance.feature!r}: these '
                "do not live where a gradient does."
            )
        self.directions = directions
        self.mode, self.side = one_of("mode", mode, get_args(Mode)), one_of("side", side, get_args(Side))
        self.overshoot = positive_number("overshoot", overshoot)
        if mode in ("measure", "keep") and overshoot != 1.0:
            raise GradRouteError(f'`overshoot` has no effect in mode="{mode}". Fix: leave it out, or mode="erase".')
        if mode == "keep" and side != "two":
            raise GradRouteError(
                f'`side` should be "two" in mode="keep", which keeps a subspace, whatever the sign. Found {side!r}.'
            )
        if side != "two":
            warn_without_sign(directions)

    @property
    def writes_blocks(self) -> tuple[BlockName, ...]:
        """Route mode writes into both blocks."""
        return ("deployed", "quarantine") if self.mode == "route" else ("deployed",)

    def filtered(self, layers: Mapping[str, RoutedLayer]) -> FilteredGradients:
        """The kept part of every module's deployed gradient; in route mode also where the removed part goes."""
        check_directions(self.directions, layers, "ProjectionFilter")
        bases = self._bases(layers)
        writes: list[tuple[nn.Parameter, Tensor]] = []
        norms: dict[str, SquaredNorms] = {}
        for name, layer in layers.items():
            parameters = list(layer.block_parameters("deployed"))
            gradients = [full_gradient(name, parameter) for parameter in parameters]
            g, V = as_row(gradients), bases[name]
            if self.mode == "keep" and not len(V):
                raise GradRouteError(
                    f'`directions` of `{name}` should have a row in mode="keep", or nothing of its gradient would be '
                    "left. Found none: an estimator has dropped them. Fix: one that drops nothing."
                )
            blocks, removed, fired = self._project(g, V, gradients)
            kept = as_row(blocks)
            if self.mode != "measure":
                writes += zip(parameters, blocks, strict=True)
            if self.mode == "route":
                # What rounding has left in `kept` is not moved: so the two add up to g.
                quarantine, removed = _with_removed(name, layer, g - kept)
                writes.append(quarantine)
            norms[name] = squared_norms(g, kept, removed, V, sided=self._sided, fired=fired)
        pooled, modules = shares(norms)
        return FilteredGradients(writes, FilterStats(self._sided, pooled, modules))

    def describe(self) -> str:
        part = "all but the part" if self.mode == "keep" else "the part"
        return f"none: {part} of the deployed gradient along the direction was filtered ({self.mode})"

    @property
    def _sided(self) -> Sided:
        return "two" if self.side == "two" else "one"

    def _project(
        self, g: Float[Tensor, " d"], V: Float[Tensor, "k d"], like: list[Tensor]
    ) -> tuple[list[Tensor], Float[Tensor, " d"], Float[Tensor, ""]]:
        """(kept in the shapes and dtypes of the gradients, removed, share of rows that fired)."""
        c = V @ g
        c_use = {"one": c.clamp(min=0), "two": c, "reverse": 2 * c}[self.side]
        fired = (c_use != 0).to(g.dtype).sum() / max(len(V), 1)
        if self.mode == "measure":
            return list(like), torch.zeros_like(g), fired
        if self.mode == "keep":
            kept = c @ V
            return as_blocks(kept, like), g - kept, fired
        removed = self.overshoot * (c_use @ V)
        return as_blocks(g - removed, like), removed, fired

    def _check_kind(self, name: str, layer: RoutedLayer) -> None:
        if block_kind(name, layer) == "lora":
            if self.directions.provenance.feature == "bottleneck":
                raise GradRouteError(
                    f"`{name}` trains LoRA matrices and has no gain that bottleneck directions could act on. Fix: "
                    'directions of features="parameter", or attach(..., parametrization="svd_gain").'
                )
            if self.mode == "route":
                raise GradRouteError(
                    f'mode="route" needs gains. Found LoRA matrices in `{name}`: the gradient of one block\'s A is not '
                    'one of the other\'s. Fix: attach(..., parametrization="svd_gain"), or mode="erase".'
                )
            return
        assert isinstance(layer, SvdGain)
        if self.mode == "route" and (layer.rotate or layer.r_quarantine < layer.r):
            found = "rotate=True" if layer.rotate else f"r={layer.r}, r_quarantine={layer.r_quarantine}"
            raise GradRouteError(
                f'mode="route" needs a quarantine that scales the axes of the deployed gains. Found {found} in '
                f"`{name}`. Fix: rotate=False and r_quarantine >= r."
            )

    def _bases(self, layers: Mapping[str, RoutedLayer]) -> dict[str, Float[Tensor, "_ _"]]:
        """V of each module, in the type and on the device of its gradient as a row."""
        homes = {}
        for name, layer in layers.items():
            self._check_kind(name, layer)
            parameters, dtype = list(layer.block_parameters("deployed")), torch.float32
            for parameter in parameters:
                check_layout(name, parameter)
                dtype = torch.promote_types(dtype, (parameter if parameter.grad is None else parameter.grad).dtype)
            homes[name] = (sum(map(size_of, parameters)), parameters[0].device, dtype)
        signs_matter = self.side == "one"
        key = ("ProjectionFilter", signs_matter, tuple(homes.items()))
        return made_once(self.directions, key, lambda: _bases(self.directions, homes, signs_matter=signs_matter))

    def __repr__(self) -> str:
        return f"ProjectionFilter({self.mode}, side={self.side!r}, overshoot={self.overshoot:g}, {self.directions!r})"


def _bases(
    directions: Directions, homes: Mapping[str, tuple[int, torch.device, torch.dtype]], *, signs_matter: bool
) -> dict[str, Tensor]:
    rows = {name: scaled_rows(directions, name) for name in homes}
    for name, (width, _, _) in homes.items():
        check_width(name, rows[name].shape[1], width)
    placed = moved_together(list(rows.values()), [device for _, device, _ in homes.values()])
    found = orthonormal_rows(dict(zip(rows, placed, strict=True)), signs_matter=signs_matter)
    return {name: V.to(homes[name][2]) for name, V in found.items()}


def _with_removed(
    name: str, layer: RoutedLayer, removed: Float[Tensor, " r"]
) -> tuple[tuple[nn.Parameter, Tensor], Float[Tensor, " r"]]:
    """The gain of the quarantine with its new gradient, and the part of it that was moved there."""
    assert isinstance(layer, SvdGain)
    own = full_gradient(name, layer.gain_quarantine)
    moved = torch.zeros_like(own)
    moved[: layer.r] = removed.to(own.dtype)
    return (layer.gain_quarantine, own + moved), wide(moved[: layer.r])
