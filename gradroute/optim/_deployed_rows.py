"""Directions in the space of the deployed parameters: one row of a module = its parameters, flattened and joined.

svd_gain: width r, bottleneck directions          LoRA: A then B, width r (d_in + d_out), parameter-shaped directions
"""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._checks import instance_of, one_of
from gradroute._per_rollout import check_width
from gradroute._protocol import routed_layers
from gradroute._sharding import as_row, check_layout, reshard, whole
from gradroute._transfers import moved_together
from gradroute.directions.directions import Directions
from gradroute.directions.parameter_rows import check_base_model, check_directions, orthonormal_rows, warn_without_sign
from gradroute.errors import GradRouteError

Side = Literal["one", "two"]


class DeployedRows:
    """The deployed parameters of each routed layer, and the rows of directions in their space, as of now.

    Args:
        model: with routed layers.
        directions: rows (k, d) per routed layer, d = number of its deployed parameters; see `ProjectionFilter`.
        side: "one" or "two"; on one side the signs of the rows matter, so they must be orthogonal.

    Warns where directions of activations are used on one side.

    Raises:
        GradRouteError: rows missing, of another width, standardised, dependent, or oblique where signs matter.
    """

    def __init__(self, model: nn.Module, directions: Directions, side: Side) -> None:
        one_of("side", side, get_args(Side))
        instance_of("directions", directions, Directions)
        if side == "one":
            warn_without_sign(directions)
        self.directions, self.side = directions, side
        reshard(model)
        self._layers = routed_layers(model)
        self.parameters = {name: list(layer.block_parameters("deployed")) for name, layer in self._layers.items()}
        for name, parameters in self.parameters.items():
            for parameter in parameters:
                check_layout(name, parameter)
        check_base_model(directions, model)
        self._bases: dict[str, Tensor] = {}
        self._version: int | None = None
        self.read()

    def read(self) -> None:
        """Read the rows again if the directions were refreshed; raises unless they fit."""
        if self._version == self.directions.version:
            return
        check_directions(self.directions, self._layers, "update projection")
        if self.directions.scale is not None:
            raise GradRouteError(
                "`directions` should have rows in the space of the parameters. Found rows of standardised features. "
                "Fix: an estimator without a scale."
            )
        found, homes = {}, []
        for name, parameters in self.parameters.items():
            rows = self.directions.rows[name]
            check_width(name, rows.shape[1], sum(p.numel() for p in parameters))
            found[name] = rows.detach()
            homes.append((parameters[0].device, torch.promote_types(parameters[0].dtype, torch.float32)))
        bases = orthonormal_rows(found, signs_matter=self.side == "one")
        placed = moved_together(list(bases.values()), [device for device, _ in homes])
        self._bases = {name: V.to(dtype) for name, V, (_, dtype) in zip(bases, placed, homes, strict=True)}
        self._version = self.directions.version

    def joined(self) -> dict[str, Float[Tensor, " d"]]:
        """A copy of the parameters, a row per module, in float32 or wider; gathered where they are sharded."""
        return {
            name: as_row([whole(parameter, name) for parameter in parameters]).clone()
            for name, parameters in self.parameters.items()
        }

    def hackward(self, name: str, update: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
        """The part of an update that runs against V, relu(-V D) (-V); two-sided: along or against it, V^T V D."""
        V = self._bases[name]
        against = -(V @ update)
        part: Tensor = -((against.clamp(min=0) if self.side == "one" else against) @ V)
        return part
