"""May a routed layer compute W x itself, instead of calling its base layer? Then it can accumulate into the result.

Only where the base is nn.Linear itself, its weight an ordinary frozen tensor, and nobody would notice that its forward
was not called: no hook on it, no forward of its own (offloading puts one there), not compiled.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

_PLAIN = (Tensor, nn.Parameter)
_AUTOCAST = {torch.float32, torch.bfloat16, torch.float16}


def frozen_linear(base: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """(weight, bias) of a base layer whose forward is F.linear(x, weight, bias) and nothing besides; else None."""
    if (
        type(base) is not nn.Linear
        or "forward" in base.__dict__
        or base._compiled_call_impl is not None
        or _hooked(base)
    ):
        return None
    parameters = base._parameters
    if "weight" not in parameters or "bias" not in parameters:
        return None  # FSDP1 keeps them elsewhere
    weight, bias = parameters["weight"], parameters["bias"]
    # A subclass (DTensor, quantised) has a product of its own; a trained weight has a gradient of its own.
    ordinary = weight is not None and type(weight) in _PLAIN and not weight.requires_grad and type(x) in _PLAIN
    if not ordinary or (bias is not None and (type(bias) not in _PLAIN or bias.requires_grad)):
        return None
    assert weight is not None
    if x.dtype == weight.dtype and x.is_floating_point():
        return weight, bias
    # Autocast leaves float64 as it is.
    return (weight, bias) if autocast_type(x) is not None and {x.dtype, weight.dtype} <= _AUTOCAST else None


def _hooked(base: nn.Module) -> bool:
    return bool(
        "forward" in base.__dict__
        or base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
        or hooks._global_backward_hooks
        or hooks._global_backward_pre_hooks
    )


def autocast_type(x: Tensor) -> torch.dtype | None:
    """The type that autocast would compute in now, if it is on."""
    device = x.device.type
    if device == "cpu":
        return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def is_identity(dropout: nn.Module) -> bool:
    """Whether a dropout need not be called: PEFT's place holder for none, with nobody watching."""
    return type(dropout) is nn.Identity and not (dropout._forward_hooks or dropout._forward_pre_hooks)
