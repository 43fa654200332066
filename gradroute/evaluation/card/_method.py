"""What a card can say of the blocks and of what decided over them, read from the objects themselves.

|Delta|^2 = sum over layers |s B A|_F^2 = sum over layers s^2 tr((B^T B)(A A^T)),   without forming B A
"""

import math
from collections import Counter
from dataclasses import dataclass

from torch import nn

from gradroute._protocol import Block, routed_layers
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError
from gradroute.filters.base import GradientFilter
from gradroute.filters.projection import ProjectionFilter
from gradroute.filters.rollout import RolloutFilter
from gradroute.gates.base import Gate
from gradroute.refresh.refresher import Refresher

RoutedBy = Gate | GradientFilter | str


@dataclass(frozen=True)
class Blocks:
    """Sizes of both blocks.

    Args:
        model_class, base_name: of the base model; no name where the model has none.
        kinds: class names of the layers, with counts.
        leaves: last parts of the layers' names.
        ranks, quarantine_ranks: that occur.
        removed_parameters: of all quarantines.
        deployed_norm, quarantine_norm: |Delta| of each, over all layers.
    """

    model_class: str
    base_name: str | None
    kinds: dict[str, int]
    leaves: list[str]
    ranks: list[int]
    quarantine_ranks: list[int]
    removed_parameters: int
    deployed_norm: float
    quarantine_norm: float

    def described(self) -> str:
        """In one line."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        return (
            f"{kinds} on {', '.join(self.leaves)}; rank {_listed(self.ranks)} deployed, "
            f"{_listed(self.quarantine_ranks)} quarantine"
        )

    def removed(self) -> str:
        """What ablation takes away."""
        return (
            f"The quarantine of {sum(self.kinds.values())} layers: rank {_listed(self.quarantine_ranks)}, "
            f"{self.removed_parameters:,d} parameters. Frobenius norm of the weight change that was removed: "
            f"{self.quarantine_norm:.4g}; of the one that is left: {self.deployed_norm:.4g}."
        )


def blocks_of(model: nn.Module) -> Blocks:
    """The sizes of the blocks of `model`.

    Raises:
        GradRouteError: no routed layers, or blocks that are not finite.
    """
    layers = routed_layers(model)
    deployed, quarantine = (
        [getattr(layer, block) for layer in layers.values()] for block in ("deployed", "quarantine")
    )
    trained = {id(p): p.numel() for layer in layers.values() for p in layer.block_parameters("quarantine")}
    base = getattr(model, "get_base_model", lambda: model)()
    name = getattr(getattr(base, "config", None), "_name_or_path", None)
    return Blocks(
        model_class=type(base).__name__,
        base_name=name or None,
        kinds=dict(Counter(type(layer).__name__ for layer in layers.values())),
        leaves=sorted({name.rpartition(".")[2] for name in layers}),
        ranks=sorted({len(block.A) for block in deployed}),
        quarantine_ranks=sorted({len(block.A) for block in quarantine}),
        removed_parameters=sum(trained.values()),
        deployed_norm=_norm(deployed),
        quarantine_norm=_norm(quarantine),
    )


def _norm(blocks: list[Block]) -> float:
    norm = math.hypot(*(block.delta_norm() for block in blocks))
    if not math.isfinite(norm):
        raise GradRouteError("The blocks of `model` should be finite. Found inf or nan. Fix: go back to a checkpoint.")
    return norm


def directions_of(routed_by: RoutedBy, refresher: Refresher | None) -> Directions | None:
    """The directions that decided; those of the refresher where `routed_by` is a sentence.

    Raises:
        GradRouteError: something that does not decide, or a refresher of other directions.
    """
    if not isinstance(routed_by, Gate | GradientFilter | str) or routed_by == "":
        raise GradRouteError(
            f"`routed_by` should be the gate or filter that was trained with, or a sentence. Found {routed_by!r}."
        )
    found: Directions | None = None if isinstance(routed_by, str) else getattr(routed_by, "directions", None)
    if refresher is None:
        return found
    if not isinstance(routed_by, str) and found is not refresher.directions:
        raise GradRouteError(
            f"`refresher` should refresh the directions of `routed_by`. Found {refresher.directions!r} there and "
            f"{found!r} here. Fix: give the refresher of this gate, or None if its directions were frozen."
        )
    return refresher.directions


def masks_of(routed_by: RoutedBy, masks: str | None) -> str:
    """The masks that a gate returns, in words; `masks` where they are given.

    Raises:
        GradRouteError: neither.
    """
    if masks is not None:
        if not isinstance(masks, str) or not masks.strip():
            raise GradRouteError(f"`masks` should be a sentence or None. Found {masks!r}.")
        return masks
    if isinstance(routed_by, Gate):
        return routed_by.describe()
    if isinstance(routed_by, RolloutFilter):
        return "none: every rollout trained the quarantine; flagged ones were taken out of the deployed gradient"
    if isinstance(routed_by, ProjectionFilter):
        return f"none: the part of the deployed gradient along the direction was filtered ({routed_by.mode})"
    raise GradRouteError(
        f"`masks` should say what the zones or weights were. Found None, which {routed_by!r} does not tell. "
        'Fix: masks="classic: flagged rows train the quarantine only, the others both blocks", say.'
    )


def _listed(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers)) if len(numbers) < 3 else f"{numbers[0]} to {numbers[-1]}"
