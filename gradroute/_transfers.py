"""Values that cross between a device and the host, or between devices: together, and not one by one.

Each read by the host waits until the device has done all that came before. A loop over layers with a read in it waits
once per layer, and the device idles in between.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradroute._sharding import is_sharded

_JOINED_BYTES = 64 * 2**20
"""What is joined for one transfer is a copy on its device for that time: so no more than this."""


def read_together(scalars: Iterable[Tensor]) -> list[Any]:
    """The Python values of tensors with one element each, in one read; of several types, in the widest of them."""
    values = list(scalars)
    if not values:
        return []
    if any(map(is_sharded, values)):
        return [value.item() for value in values]  # each is reduced over the ranks
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    home = values[0].device
    found: list[Any] = torch.stack([value.detach().to(home, dtype).reshape(()) for value in values]).tolist()
    return found


def moved_together(tensors: Sequence[Tensor], devices: torch.device | Sequence[torch.device]) -> list[Tensor]:
    """The tensors on one device, or each on its own; what is alike goes in one transfer, if that is not too large."""
    out: list[Tensor] = list(tensors)
    homes = [devices] * len(tensors) if isinstance(devices, torch.device) else devices
    away: dict[tuple[torch.device, torch.device, torch.dtype], list[int]] = {}
    for i, (tensor, home) in enumerate(zip(tensors, homes, strict=True)):
        if tensor.device != home:
            away.setdefault((tensor.device, home, tensor.dtype), []).append(i)
    for (_, home, _), places in away.items():
        for group in _groups(tensors, places):
            joined = torch.cat([tensors[i].detach().reshape(-1) for i in group]).to(home)
            parts = torch.split(joined, [tensors[i].numel() for i in group])
            for i, part in zip(group, parts, strict=True):
                out[i] = part.reshape(tensors[i].shape)
    return out


def _groups(tensors: Sequence[Tensor], places: Sequence[int]) -> Iterator[list[int]]:
    group: list[int] = []
    size = 0
    for i in places:
        size += tensors[i].numel() * tensors[i].element_size()
        if group and size > _JOINED_BYTES:
            yield group
            group, size = [], tensors[i].numel() * tensors[i].element_size()
        group.append(i)
    yield group
