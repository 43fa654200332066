"""Does an optimizer hold the blocks? One that was made before `attach` trains none of them, and torch says nothing."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from gradroute._checks import listed
from gradroute._protocol import BLOCKS, BlockName, routed_layers
from gradroute._sharding import reshard
from gradroute._step_hooks import torch_optimizer
from gradroute.errors import GradRouteError


def check_optimized(model: nn.Module, optimizers: Iterable[Any], error: type[GradRouteError] = GradRouteError) -> None:
    """Raise unless the optimizers together hold every trainable parameter of both blocks of `model`.

    What DeepSpeed trains is left out: its optimizers hold flat copies and no parameter of a model.
    """
    # DeepSpeed marks the parameters whose copies it steps.
    ours = [(name, p) for name, p in block_parameters(model) if not (hasattr(p, "_hp_mapping") or hasattr(p, "ds_id"))]
    check_held(optimizers, ours, error)


def block_parameters(model: nn.Module, blocks: Sequence[BlockName] = BLOCKS) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of both blocks, or of those named, with the names of their layers."""
    reshard(model)
    for name, layer in routed_layers(model).items():
        for block in blocks:
            for parameter in layer.block_parameters(block):
                yield name, parameter


def held_blocks(model: nn.Module, optimizer: Any, others: Iterable[Any]) -> set[int]:
    """The ids of what `optimizer` holds: some of the blocks of `model`, and together with `others` all of them."""
    blocks = list(block_parameters(model))
    check_held([optimizer, *others], blocks)
    held = _held([optimizer])
    if not any(id(parameter) in held for _, parameter in blocks):
        raise GradRouteError(
            "`optimizer` should hold parameters of the blocks of `model`. Found none that can be trained."
        )
    return held


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
    held = _held(optimizers)
    missing = [name for name, parameter in wanted if id(parameter) not in held]
    if missing:
        names = listed(list(dict.fromkeys(missing)))
        raise error(
            "`optimizer` should hold every parameter of the blocks that is to be trained. Found that it lacks "
            f"{len(missing)} of {len(wanted)}, those of {names}: they would never be trained. Fix: make the optimizer "
            "after attach() or get_peft_model(), and after wrapping or moving the model, from "
            "deployed_parameters(model) and quarantine_parameters(model); of several optimizers, name all of them."
        )


def _held(optimizers: Iterable[Any]) -> set[int]:
    groups = (group for optimizer in optimizers for group in torch_optimizer(optimizer).param_groups)
    return {id(parameter) for group in groups for parameter in group["params"]}
