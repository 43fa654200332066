"""How many parameters each block has, out of how many, and what else is trained."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from gradroute._protocol import routed_layers


@dataclass(frozen=True, repr=False)
class ParameterSummary:
    """Numbers of parameters; `print` it.

    Args:
        layers: number of routed layers.
        deployed, quarantine: trainable parameters of each block.
        total: parameters of the whole model, frozen ones included.
        trained_besides: name -> number, of what is trained outside of the blocks, past every mask.
    """

    layers: int
    deployed: int
    quarantine: int
    total: int
    trained_besides: dict[str, int]

    def __repr__(self) -> str:
        besides = sum(self.trained_besides.values())
        trainable = self.deployed + self.quarantine + besides
        text = (
            f"trainable params: {trainable:,d} (deployed {self.deployed:,d} + quarantine {self.quarantine:,d} in "
            f"{self.layers} layers"
        )
        if besides:
            text += f" + {besides:,d} besides: {', '.join(list(self.trained_besides)[:3])}"
        return f"{text}) || all params: {self.total:,d} || trainable%: {100 * trainable / self.total:.4f}"


def parameter_summary(model: nn.Module) -> ParameterSummary:
    """How many parameters of each block are trainable, out of how many; `print` it.

    Args:
        model: with routed layers.

    Raises:
        GradRouteError: `model` has no routed layers.
    """
    layers = routed_layers(model)
    blocks: dict[str, dict[int, int]] = {"deployed": {}, "quarantine": {}}
    for layer in layers.values():
        for block, sizes in blocks.items():
            of_block: Any = block
            sizes.update({id(p): p.numel() for p in layer.block_parameters(of_block)})
    trainable = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    besides = {
        name: p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and not any(id(p) in sizes for sizes in blocks.values())
    }
    deployed, quarantine = (sum(n for key, n in sizes.items() if key in trainable) for sizes in blocks.values())
    return ParameterSummary(len(layers), deployed, quarantine, sum(p.numel() for p in model.parameters()), besides)
