"""Does an optimizer hold the blocks? One that was made before `attach` trains none of them, and torch says nothing."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from gradroute._protocol import BLOCKS, routed_layers
from gradroute._sharding import reshard
from gradroute._step_hooks import torch_optimizer
from gradroute.errors import GradRouteError


def check_optimized(model: nn.Module, optimizers: Iterable[Any], error: type[GradRouteError] = GradRouteError) -> None:
    """Raise unless the optimizers together hold every trainable parameter of both blocks of `model`.

    What DeepSpeed trains is left out: its optimizers hold flat copies and no parameter of a model.
    """
    check_held(optimizers, [each for each in block_parameters(model) if not _taken_over(each[1])], error)


def block_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of both blocks, with the names of their layers."""
    reshard(model)
    for name, layer in routed_layers(model).items():
        for block in BLOCKS:
            for parameter in layer.block_parameters(block):
                yield name, parameter


def check_held(
    optimizers: Iterable[Any],
    parameters: Iterable[tuple[str, nn.Parameter]],
    error: type[GradRouteError] = GradRouteError,
) -> None:
    """Raise unless the optimizers together hold every trainable one of `parameters`, pairs of (layer name, parameter).

    Where none is trainable the optimizers should hold all of them.
    """
    every = list(parameters)
    wanted = [each for each in every if each[1].requires_grad] or every
    groups = (group for optimizer in optimizers for group in torch_optimizer(optimizer).param_groups)
    held = {id(parameter) for group in groups for parameter in group["params"]}
    missing = [name for name, parameter in wanted if id(parameter) not in held]
    if missing:
        names = list(dict.fromkeys(missing))
        layers = ", ".join(f"`{name}`" for name in names[:3]) + (
            f" and {len(names) - 3} more layers" if names[3:] else ""
        )
        raise error(
            "`optimizer` should hold every parameter of the blocks that is to be trained. Found that it lacks "
            f"{len(missing)} of {len(wanted)}, those of {layers}: they would never be trained. "
            "Fix: make the optimizer after attach() or get_peft_model(), and after wrapping or moving the model, from "
            "deployed_parameters(model) and quarantine_parameters(model); where there are several optimizers, name all "
            "of them."
        )


def _taken_over(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed steps a copy of this parameter."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")
