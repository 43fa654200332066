"""Tensors read whole and written back, sharded or not.

A DTensor is gathered on every rank, in the same order, and each rank writes its own shard back. Flat parameters of
FSDP1 and partitions of DeepSpeed cannot be taken apart, and are refused.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradroute.errors import GradRouteError


def check_layout(name: str, parameter: Tensor) -> None:
    """Raise unless a rank holds a parameter of layer `name` whole, or as a DTensor.

    Raises:
        GradRouteError: FSDP1 or DeepSpeed.
    """
    if getattr(parameter, "_fsdp_flattened", False) or not isinstance(parameter, nn.Parameter):
        raise GradRouteError(
            f"The deployed block of `{name}` is in a flat parameter of FSDP1, where its gradient cannot be told apart. "
            "Fix: shard with fully_shard (FSDP2)."
        )
    if hasattr(parameter, "ds_id"):
        raise GradRouteError(
            f"The deployed block of `{name}` is partitioned by DeepSpeed, which takes its gradient away in backward. "
            "Fix: train with DDP or fully_shard (FSDP2)."
        )


def full_gradient(name: str, parameter: Tensor) -> Tensor:
    """The whole gradient of a parameter of layer `name`, in the parameter's shape.

    Raises:
        GradRouteError: there is none; it is flattened (FSDP1), consumed (DeepSpeed), or not reduced yet.
    """
    check_layout(name, parameter)
    if parameter.grad is None:
        raise GradRouteError(
            f"The gradient of the deployed block of `{name}` is None, so there is nothing to filter. Fix: filter "
            "between backward() and zero_grad(), with the block trainable."
        )
    gradient = whole(parameter.grad, name)
    if gradient.shape != parameter.shape:
        raise GradRouteError(
            f"The gradient of `{name}` should have the shape {tuple(parameter.shape)} of its parameter. Found "
            f"{tuple(gradient.shape)}: sharded in a way that is not supported. Fix: shard with fully_shard (FSDP2)."
        )
    return gradient


def whole(tensor: Tensor, name: str) -> Tensor:
    """A tensor as it is, or the gathered one of a DTensor."""
    if not is_sharded(tensor):
        return tensor.detach()
    sharded: Any = tensor.detach()
    if any(placement.is_partial() for placement in sharded.placements):
        raise GradRouteError(
            f"The gradient of `{name}` is not reduced over all ranks yet. Fix: filter after the last micro-batch."
        )
    gathered: Tensor = sharded.full_tensor()
    return gathered


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow to import, and most runs have none

    return isinstance(tensor, DTensor)


def overwrite(tensor: Any, values: Tensor) -> None:
    """Put whole `values` into a tensor; of a DTensor, a rank takes its shard."""
    if not is_sharded(tensor):
        tensor.copy_(values)
        return
    from torch.distributed.tensor import DTensor, Replicate  # noqa: PLC0415

    mesh = tensor.device_mesh
    replicated = DTensor.from_local(values.to(tensor.dtype), mesh, [Replicate()] * mesh.ndim, run_check=False)
    tensor.copy_(replicated.redistribute(placements=tensor.placements))


def wide(tensor: Tensor) -> Tensor:
    """In float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def as_row(tensors: Sequence[Tensor]) -> Float[Tensor, " d"]:
    """Flattened one after the other, in float32 or wider."""
    return torch.cat([wide(tensor).flatten() for tensor in tensors])


def as_blocks(row: Float[Tensor, " d"], like: Sequence[Tensor]) -> list[Tensor]:
    """The inverse of `as_row`: shapes and dtypes of `like`."""
    parts = torch.split(row, [tensor.numel() for tensor in like])
    return [part.reshape(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]
