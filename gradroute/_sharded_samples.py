"""Evenly spaced values of many parameters, read once from the device, and of sharded ones without gathering any.

    index_i = floor(i (n - 1) / (k - 1)),   i < k = min(most, n),   n = size of the flattened parameter

A rank reads the values in its own shard and leaves the others zero; the sum over the ranks of their bits has all of
them. That is one small reduction per device mesh, where gathering would move the whole model.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from gradroute._sharding import is_partitioned, is_sharded, shape_of, size_of, whole


def evenly_spaced(parameters: Mapping[str, Tensor], most: int) -> dict[str, list[float]]:
    """Up to `most` values of each parameter, by name, as float64; collective where one is sharded.

    Raises:
        GradRouteError: a flat parameter of FSDP1.
    """
    counts = {name: min(most, size_of(parameter)) for name, parameter in parameters.items()}
    plain: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    indices: dict[tuple[int, torch.device], Tensor] = {}
    found: dict[str, Tensor] = {}
    shared: dict[Any, list[_Share]] = {}
    for name, parameter in parameters.items():
        index = torch.linspace(0, max(size_of(parameter) - 1, 0), counts[name], dtype=torch.float64).long()
        share = _share_of(name, parameter, index)
        if share is not None:
            shared.setdefault(share.groups, []).append(share)
            continue
        flat = whole(parameter, name).reshape(-1)
        key = size_of(parameter), flat.device
        indices[key] = indices[key] if key in indices else index.to(flat.device)
        plain.setdefault((flat.device, flat.dtype), {})[name] = flat[indices[key]]
    for values in plain.values():
        # In the parameters' own type: not every device knows float64.
        joined = torch.cat(list(values.values())).cpu().double()
        found |= dict(zip(values, torch.split(joined, [counts[name] for name in values]), strict=True))
    for groups, shares in shared.items():
        found |= _summed(groups, shares)
    return {name: found[name].tolist() for name in parameters}


class _Share(NamedTuple):
    """What this rank has of a parameter's values, zero where another rank has them.

    Args:
        name: of the parameter.
        values: of all its samples, in float64.
        groups: the process groups to sum over, one after the other.
        home: the device that they reduce on, also where shards are kept in the memory of the CPU.
    """

    name: str
    values: Float[Tensor, " samples"]
    groups: tuple[Any, ...]
    home: torch.device


def _share_of(name: str, parameter: Any, index: Int[Tensor, " samples"]) -> _Share | None:
    """None of a parameter that is not sharded, or in a way that only its owner can take apart."""
    if is_partitioned(parameter):
        share, group = parameter.ds_tensor, parameter.ds_process_group
        if share.is_meta or share.numel() * dist.get_world_size(group) < size_of(parameter):
            return None  # on a disk
        local = index - dist.get_rank(group) * share.numel()
        return _Share(name, _picked(share, local, (local >= 0) & (local < share.numel())), (group,), parameter.device)
    if not is_sharded(parameter):
        return None
    box = _box(parameter)
    if box is None:
        return None
    starts, stops, counts_here = box
    local = parameter.detach().to_local().contiguous()
    places = torch.stack(torch.unravel_index(index, shape_of(parameter)))
    mine = ((places >= starts[:, None]) & (places < stops[:, None])).all(0) & counts_here
    flat = ((places - starts[:, None]) * torch.tensor(local.stride())[:, None]).sum(0)
    mesh = parameter.device_mesh
    groups = tuple(mesh.get_group(i) for i in range(mesh.ndim))
    return _Share(name, _picked(local.reshape(-1), flat, mine), groups, torch.device(mesh.device_type))


def _box(parameter: Any) -> tuple[Tensor, Tensor, bool] | None:
    """(starts, stops) of the local shard by axis, and whether it counts: of replicas one does.

    None of a layout other than pieces in the order of the ranks (FSDP2 beside tensor parallelism).
    """
    from torch.distributed.tensor import Replicate, Shard  # noqa: PLC0415

    mesh, shape = parameter.device_mesh, shape_of(parameter)
    starts, sizes, counts_here = [0] * len(shape), list(shape), True
    for i, placement in enumerate(parameter.placements):
        rank = mesh.get_local_rank(i)
        if type(placement) is Shard:
            size = sizes[placement.dim]
            piece = -(-size // mesh.size(i))  # as torch.chunk cuts
            start = min(rank * piece, size)
            starts[placement.dim] += start
            sizes[placement.dim] = min(piece, size - start)
        elif type(placement) is Replicate:
            counts_here &= rank == 0
        else:
            return None
    if tuple(sizes) != tuple(parameter.to_local().shape):
        return None
    begin = torch.tensor(starts)
    return begin, begin + torch.tensor(sizes), counts_here


def _picked(flat: Tensor, index: Int[Tensor, " samples"], mine: Tensor) -> Float[Tensor, " samples"]:
    values = torch.zeros(len(index), dtype=torch.float64, device=flat.device)
    where = mine.to(flat.device)
    values[where] = flat[index[mine].to(flat.device)].double()
    return values


def _summed(groups: tuple[Any, ...], shares: list[_Share]) -> dict[str, Tensor]:
    # Their bits as integers: so a sum with zeros is exact for -0.0 and for nan as well.
    bits = torch.cat([share.values.to(share.home) for share in shares]).view(torch.int64)
    for group in groups:
        dist.all_reduce(bits, group=group)
    parts = torch.split(bits.cpu().view(torch.float64), [len(share.values) for share in shares])
    return {share.name: values for share, values in zip(shares, parts, strict=True)}
