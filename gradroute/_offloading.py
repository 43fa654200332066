"""Weights that accelerate keeps on the CPU or on disk: on the meta device, until the module that holds them is called.

    module.weight  is meta;      module._hf_hook.weights_map["weight"]  has the values

Code that reads a weight without calling its module has to fetch it. Arithmetic with a meta tensor does not raise: the
result is meta too, and accelerate turns that into memory that was never written.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gradroute.errors import GradRouteError, TargetError


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
            return values if hook.execution_device is None else values.to(_device(hook.execution_device))
    raise GradRouteError(
        f"The {name} of a {type(module).__name__} should have values. Found it on the meta device. "
        "Fix: load the model's weights first."
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


def _device(device: Any) -> torch.device:
    # accelerate counts GPUs: 0 is cuda:0, or the only accelerator there is.
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


OFFLOADED_TRAINING = (
    "`{name}`: blocks that accelerate offloads cannot be trained: each call gets a copy, and gradients go with it. "
    "Fix: torch.no_grad() for evaluation; keep the adapted layers in memory for training."
)
