"""Does an optimizer hold the blocks? One that was made before `attach` trains none of them, and torch says nothing."""

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from gradroute._protocol import BlockName, routed_layers
from gradroute.errors import GradRouteError

_BLOCKS: tuple[BlockName, ...] = ("deployed", "quarantine")


def check_optimized(
    model: nn.Module, optimizers: Iterable[Optimizer], error: type[GradRouteError] = GradRouteError
) -> None:
    """Raise unless the optimizers together hold every trainable parameter of both blocks of `model`."""
    blocks = {
        id(parameter): (name, parameter)
        for name, layer in routed_layers(model).items()
        for block in _BLOCKS
        for parameter in layer.block_parameters(block)
    }
    trainable = {key: found for key, found in blocks.items() if found[1].requires_grad} or blocks
    held = {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]}
    missing = [name for key, (name, parameter) in trainable.items() if key not in held and not _taken_over(parameter)]
    if missing:
        names = list(dict.fromkeys(missing))
        more = f" and {len(names) - 3} layers more" if len(names) > 3 else ""
        raise error(
            f"The optimizers should hold every parameter of both blocks. Found none that holds {len(missing)} of "
            f"{len(trainable)}, those of {', '.join(f'`{name}`' for name in names[:3])}{more}: they would never be "
            "trained. Fix: make the optimizer after attach() or get_peft_model(), of deployed_parameters(model) and "
            "quarantine_parameters(model); where there are several optimizers, give all of them in one call."
        )


def _taken_over(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed steps a copy of this parameter: its optimizers hold flat copies and no parameter of a model."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
