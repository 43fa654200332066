"""Sizes and norms of both blocks, read from the model.

|Delta|^2 = sum over layers |s B A|_F^2 = sum over layers s^2 tr((B^T B)(A A^T)),   without forming B A
"""

import math
from collections import Counter
from dataclasses import dataclass

from torch import nn

from gradroute._protocol import Block, delta_norms, routed_layers
from gradroute._sharding import class_of, size_of
from gradroute.errors import GradRouteError


@dataclass(frozen=True)
class Blocks:
    """Sizes of both blocks.

    Args:
        model_class, base_name: of the base model; no name where the model has none.
        kinds: class names of the layers, with counts.
        leaves: last parts of the layers' names.
        ranks, quarantine_ranks: all that occur.
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

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.kinds.items())
        return (
            f"{kinds} on {', '.join(self.leaves)}; rank {_listed(self.ranks)} deployed, "
            f"{_listed(self.quarantine_ranks)} quarantine"
        )

    def removed(self, scale: float) -> str:
        """The net delta that ablation takes away, and the one that is left, with the quarantine at `scale`."""
        what = f"A share of {1 - scale:g} of the quarantine" if scale else "The quarantine"
        rest = f" in the deployed block, {scale * self.quarantine_norm:.4g} in the quarantine" if scale else ""
        return (
            f"{what} of {sum(self.kinds.values())} layers: rank {_listed(self.quarantine_ranks)}, "
            f"{self.removed_parameters:,d} parameters. Frobenius norm of the weight change that was removed: "
            f"{(1 - scale) * self.quarantine_norm:.4g}; of the one that is left: {self.deployed_norm:.4g}{rest}."
        )


def blocks_of(model: nn.Module) -> Blocks:
    """The sizes of the blocks of `model`.

    Raises:
        GradRouteError: no routed layers, or blocks that are not finite.
    """
    layers = routed_layers(model)
    deployed, quarantine = (
        [getattr(layer, block).whole(name) for name, layer in layers.items()] for block in ("deployed", "quarantine")
    )
    trained = {id(p): size_of(p) for layer in layers.values() for p in layer.block_parameters("quarantine")}
    base = getattr(model, "get_base_model", lambda: model)()
    name = getattr(getattr(base, "config", None), "_name_or_path", None)
    return Blocks(
        model_class=class_of(base).__name__,
        base_name=name or None,
        kinds=dict(Counter(class_of(layer).__name__ for layer in layers.values())),
        leaves=sorted({name.rpartition(".")[2] for name in layers}),
        ranks=sorted({len(block.A) for block in deployed}),
        quarantine_ranks=sorted({len(block.A) for block in quarantine}),
        removed_parameters=sum(trained.values()),
        deployed_norm=_norm(deployed),
        quarantine_norm=_norm(quarantine),
    )


def _norm(blocks: list[Block]) -> float:
    norm = math.hypot(*delta_norms(blocks))
    if not math.isfinite(norm):
        raise GradRouteError("The blocks of `model` should be finite. Found inf or nan. Fix: go back to a checkpoint.")
    return norm


def _listed(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers)) if len(numbers) < 3 else f"{numbers[0]} to {numbers[-1]}"
