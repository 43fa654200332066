"""Parameters read whole and written back, however they are sharded.

    plain      what a rank holds is all of it
    FSDP2      a DTensor; during a forward of its group a plain tensor, perhaps of another type
    ZeRO-3     empty but for `ds_tensor`, a flat share of it; during a forward of its module a plain tensor

Reading is collective: every rank of the model reads, in the same order. Parameters of FSDP1 cannot be taken apart, and
are refused.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradroute._torch_private import fsdp_groups, gathered_by_fsdp
from gradroute.errors import GradRouteError, TargetError


def check_not_sharded(layer: str, module: nn.Module) -> None:
    """Raise if `fully_shard` has sharded `module`: blocks that are put into it now are no part of any of its groups.

    Raises:
        TargetError: it is sharded.
    """
    if is_fully_sharded(module):
        raise TargetError(
            f"`{layer}` is sharded already. Blocks that are added now would be trained by each rank alone, on its own "
            "rows. Fix: adapt the model first and call fully_shard then."
        )


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


def whole(tensor: Tensor, name: str = "") -> Tensor:
    """A tensor without its graph: as it is, or gathered on every rank where it is sharded.

    Args:
        tensor: a parameter, a gradient, or anything else.
        name: of its layer, for a message.

    Raises:
        GradRouteError: a flat parameter of FSDP1, or gradients that are not reduced yet.
    """
    if is_partitioned(tensor):
        return _whole_partitioned(tensor, name)
    if not is_sharded(tensor):
        if getattr(tensor, "_fsdp_flattened", False):
            raise GradRouteError(
                f"`{name}` should be a parameter that can be read whole. Found a flat one of FSDP1, of which this rank "
                "holds a part. Fix: shard with fully_shard (FSDP2)."
            )
        return tensor.detach()
    sharded: Any = tensor.detach()
    if any(placement.is_partial() for placement in sharded.placements):
        raise GradRouteError(
            f"The gradient of `{name}` is not reduced over all ranks yet. Fix: filter after the last micro-batch."
        )
    gathered: Tensor = sharded.full_tensor()
    return gathered


def readable(parameter: Tensor, name: str = "") -> Tensor:
    """A parameter itself, for a product with a gradient, where this rank has all of it; else what `whole` gathers."""
    lacks = not _is_available(parameter) if is_partitioned(parameter) else is_sharded(parameter)
    return whole(parameter, name) if lacks else parameter


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of a whole parameter."""
    found: torch.Size = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
    return found


def size_of(parameter: Tensor) -> int:
    """How many numbers a whole parameter has."""
    return shape_of(parameter).numel()


def held(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter all the time: its version and address tell whether anything was written."""
    if is_partitioned(parameter):
        share: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        return share
    if is_sharded(parameter):
        sharded: Any = parameter.detach()
        local: Tensor = sharded.to_local()
        return local
    return parameter


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow to import, and most runs have none

    return isinstance(tensor, DTensor)


def is_partitioned(tensor: Tensor) -> bool:
    """Whether it is a parameter of DeepSpeed's ZeRO stage 3."""
    return hasattr(tensor, "ds_id")


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards a parameter of `module`, also where a forward has left the whole one in its place."""
    parameters = list(module.parameters())
    return any(is_sharded(p) for p in parameters) or not gathered_by_fsdp().isdisjoint(map(id, parameters))


def is_split(module: nn.Module) -> bool:
    """Whether a rank holds less than all of some parameter of `module` between forwards: FSDP2 or ZeRO-3."""
    return is_fully_sharded(module) or any(is_partitioned(parameter) for parameter in module.parameters())


def ranks_of(tensors: Iterable[Tensor]) -> list[int]:
    """The ranks that have to read together, of the first of `tensors` that is sharded; none where none is."""
    for tensor in tensors:
        if is_partitioned(tensor):
            group: Any = tensor.ds_process_group  # type: ignore[attr-defined]
            return torch.distributed.get_process_group_ranks(group)
        if is_sharded(tensor):
            sharded: Any = tensor
            ranks: list[int] = sharded.device_mesh.mesh.flatten().tolist()
            return ranks
    return []


def reshard(model: nn.Module) -> None:
    """Have FSDP2 put its shards back, as after a backward.

    After a forward without gradients the root group, and what is in no other, keeps whole parameters, rounded to the
    type that forwards run in. An optimizer would never step them.
    """
    if not fsdp_groups():
        return
    from torch.distributed import fsdp  # noqa: PLC0415 - slow to import, and loaded where something is sharded

    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, not the one that `fully_shard` makes of it."""
    kind = type(module)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or fsdp.FSDPModule not in kind.__bases__:
        return kind
    return next(base for base in kind.__bases__ if base is not fsdp.FSDPModule)


def _is_available(parameter: Any) -> bool:
    status: str = parameter.ds_status.name
    return status == "AVAILABLE"


def _whole_partitioned(parameter: Any, name: str) -> Tensor:
    if _is_available(parameter):  # inside of the forward that gathered it, or small enough to be kept
        held_whole: Tensor = parameter.detach().clone()
        return held_whole
    import deepspeed  # noqa: PLC0415 - only where DeepSpeed has made the parameter

    with torch.no_grad(), deepspeed.zero.GatheredParameters([parameter]):
        gathered: Tensor = parameter.detach().clone()
    if gathered.shape != shape_of(parameter):
        raise GradRouteError(
            f"`{name}` should be gathered whole, {tuple(shape_of(parameter))}. Found {tuple(gathered.shape)}: "
            "DeepSpeed was fetching it at that time. Fix: read it outside of forward and backward."
        )
    return gathered


def overwrite(tensor: Any, values: Tensor) -> None:
    """Put whole `values`, the same on every rank, into a parameter; where it is split, a rank takes its share."""
    if is_partitioned(tensor):
        import deepspeed  # noqa: PLC0415 - only where DeepSpeed has made the parameter

        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            tensor.copy_(values)
        return
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
