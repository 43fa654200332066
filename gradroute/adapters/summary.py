"""Numbers of parameters: of each block, of the whole model, and of whatever else is trained."""

from dataclasses import dataclass

from torch import nn

from gradroute._protocol import BLOCKS, routed_layers
from gradroute._sharding import size_of


@dataclass(frozen=True, repr=False)
class ParameterSummary:
    """Numbers of parameters; `print` it.

    Args:
        layers: number of routed layers.
        deployed, quarantine: trainable parameters of each block.
        total: parameters of the whole model, frozen ones included.
        trained_elsewhere: name -> number, of parameters that are trained outside of the blocks, past every mask.
    """

    layers: int
    deployed: int
    quarantine: int
    total: int
    trained_elsewhere: dict[str, int]

    def __repr__(self) -> str:
        elsewhere = sum(self.trained_elsewhere.values())
        trainable = self.deployed + self.quarantine + elsewhere
        text = (
            f"trainable params: {trainable:,d} (deployed {self.deployed:,d} + quarantine {self.quarantine:,d} in "
            f"{self.layers} layers"
        )
        if elsewhere:
            text += f" + {elsewhere:,d} elsewhere: {', '.join(list(self.trained_elsewhere)[:3])}"
        return f"{text}) || all params: {self.total:,d} || trainable%: {100 * trainable / self.total:.4f}"


def parameter_summary(model: nn.Module) -> ParameterSummary:
    """Count the trainable parameters of each block, and those of the whole model; `print` the result.

    Args:
        model: with routed layers.

    Raises:
        GradRouteError: `model` has no routed layers.
    """
    layers = routed_layers(model)
    blocks: list[dict[int, int]] = [
        {id(p): size_of(p) for layer in layers.values() for p in layer.block_parameters(block)} for block in BLOCKS
    ]
    trainable = {id(p): size_of(p) for p in model.parameters() if p.requires_grad}
    elsewhere = {
        name: size_of(p)
        for name, p in model.named_parameters()
        if p.requires_grad and not any(id(p) in sizes for sizes in blocks)
    }
    deployed, quarantine = (sum(n for key, n in sizes.items() if key in trainable) for sizes in blocks)
    return ParameterSummary(len(layers), deployed, quarantine, sum(size_of(p) for p in model.parameters()), elsewhere)
