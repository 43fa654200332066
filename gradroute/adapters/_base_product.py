"""Where a routed layer may compute W x itself and accumulate into the result, instead of calling its base layer.

That is where the base is nn.Linear itself, its weight is an ordinary frozen tensor, and nobody would notice that its
forward was not called: no hook on it, no forward put on the instance (as offloading does), not compiled.
"""

import torch
from torch import Tensor, nn

from gradroute._torch_private import forward_is_watched

_PLAIN = (Tensor, nn.Parameter)
_AUTOCAST = {torch.float32, torch.bfloat16, torch.float16}


def frozen_linear(base: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of a base layer whose forward is F.linear(x, weight, bias) and nothing else; None for others."""
    if type(base) is not nn.Linear or forward_is_watched(base):
        return None
    parameters = base._parameters
    if "weight" not in parameters or "bias" not in parameters:
        return None  # FSDP1 keeps them elsewhere
    weight, bias = parameters["weight"], parameters["bias"]
    # A subclass (DTensor, quantised) defines another product; a trained weight needs a gradient.
    ordinary = weight is not None and type(weight) in _PLAIN and not weight.requires_grad and type(x) in _PLAIN
    if not ordinary or (bias is not None and (type(bias) not in _PLAIN or bias.requires_grad)):
        return None
    assert weight is not None
    if x.dtype == weight.dtype and x.is_floating_point():
        return weight, bias
    # Autocast leaves float64 as it is.
    return (weight, bias) if autocast_type(x) is not None and {x.dtype, weight.dtype} <= _AUTOCAST else None


def autocast_type(x: Tensor) -> torch.dtype | None:
    """The type that autocast would compute in now, if it is on."""
    device = x.device.type
    if device == "cpu":
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def is_identity(dropout: nn.Module) -> bool:
    """Whether a dropout need not be called: PEFT's place holder for none, without hooks."""
    return type(dropout) is nn.Identity and not (dropout._forward_hooks or dropout._forward_pre_hooks)
