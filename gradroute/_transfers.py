"""Values that cross between a device and the host, or between devices: together, and not one by one.

Each read by the host waits until the device has done all that came before. A loop over layers with a read in it waits
once per layer, and the device idles in between.

Weights that accelerate keeps on the CPU or on disk are on the meta device until the module that holds them is called:

    module.weight  is meta;      module._hf_hook.weights_map["weight"]  has the values

Code that reads a weight without calling its module has to fetch it. Arithmetic with a meta tensor does not raise: the
result is meta too, and accelerate turns that into memory that was never written.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from gradroute._sharding import is_sharded
from gradroute.errors import GradRouteError, RouteError, TargetError

_JOINED_BYTES = 64 * 2**20
"""What is joined for one transfer is a copy on its device for that time: so no more than this."""


def read_together(scalars: Iterable[Tensor]) -> list[Any]:
    """The Python values of tensors with one element each, in one read; of several types, in the widest of them."""
    values = list(scalars)
    if not values:
        return []
    if any(map(is_sharded, values)):
        return [value.item() for value in values]  # each is reduced over the ranks
    home, dtype = values[0].device, reduce(torch.promote_types, (value.dtype for value in values))
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


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate fetches the weights of `module` for each call, and drops them after it."""
    return any(hook.offload for hook in _hooks(module))


def check_not_offloaded(layer: str, module: nn.Module) -> None:
    """Raise if `module` is offloaded: new blocks would be on the meta device too, without a copy in accelerate."""
    if is_offloaded(module):
        raise TargetError(
            f"`{layer}` is offloaded by accelerate: new blocks around it would have no values. Fix: adapt the model "
            "first and offload it then, or accelerate.hooks.remove_hook_from_submodules(model) first."
        )


def in_memory(module: nn.Module, name: str) -> Tensor:
    """A parameter of `module`, fetched if it is offloaded.

    Raises:
        GradRouteError: it is on the meta device, and accelerate has no copy.
    """
    parameter = module.get_parameter(name)
    if not parameter.is_meta:
        return parameter
    for hook in _hooks(module):
        if hook.offload and hook.weights_map is not None:
            values: Tensor = hook.weights_map[name].detach()
            home = hook.execution_device
            # accelerate counts GPUs: 0 is cuda:0, or the only accelerator there is.
            return values if home is None else values.to(torch.device("cuda", home) if isinstance(home, int) else home)
    raise GradRouteError(
        f"The {name} of a {type(module).__name__} should have values. Found it on the meta device. Fix: load the model."
    )


def offloaded_training(layer: str) -> RouteError:
    """The error for a forward with gradients through offloaded blocks."""
    return RouteError(
        f"`{layer}`: blocks that accelerate offloads cannot be trained: each call gets a copy, and gradients go with "
        "it. Fix: torch.no_grad() for evaluation; keep the adapted layers in memory for training."
    )


def check_in_memory(layer: str, *tensors: Tensor) -> None:
    """Raise if any of a layer's tensors is on the meta device, where reading it gives nothing."""
    if any(tensor.is_meta for tensor in tensors):
        raise GradRouteError(
            f"`{layer}` should be in memory. Found it on the meta device: not loaded yet, or offloaded by accelerate. "
            "Fix: load its weights, or accelerate.hooks.remove_hook_from_submodules(model)."
        )


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook: Any = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):
        if hasattr(each, "offload"):
            yield each
