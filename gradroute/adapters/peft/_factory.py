"""Which layer PEFT's adapter gets for a target: PEFT's own, its class extended by routing; anything else is refused."""

from functools import cache
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from gradroute.adapters._targets import check_base_layer, gives_one_tensor
from gradroute.adapters.peft._private import QUANTISED, build_own_layer, quantised_class, takes_blocks
from gradroute.adapters.peft.config import QuarantineLoraConfig
from gradroute.adapters.peft.routed_lora import RoutedLoraLayer
from gradroute.errors import TargetError


class RoutedLoraLinear(RoutedLoraLayer, LoraLinear):
    """PEFT's layer for nn.Linear and Conv1D with a quarantine."""


@cache
def routed_class(peft_class: type) -> type:
    """The class of a PEFT layer, extended by routing."""
    if peft_class is LoraLinear:
        return RoutedLoraLinear
    name = f"Routed{peft_class.__name__}"
    return type(name, (RoutedLoraLayer, peft_class), {"__module__": __name__, "__doc__": RoutedLoraLayer.__doc__})


def __getattr__(name: str) -> type:
    # Unpickling looks the quantised classes up here; they are made on demand, for bitsandbytes is slow to import.
    if name.removeprefix("Routed") in QUANTISED:
        return routed_class(quantised_class(name.removeprefix("Routed")))
    raise AttributeError(name)


def build_routed_layer(
    target: nn.Module, adapter_name: str, config: QuarantineLoraConfig, *, target_name: str = "", **kwargs: Any
) -> nn.Module:
    """PEFT's layer for `target`, with routing mixed in.

    Raises:
        TargetError: PEFT's layer for it is none of nn.Linear, Conv1D, bitsandbytes 8 or 4 bit.
    """
    if config.target_parameters:
        # PEFT adds these by itself on architectures whose experts are packed, after the config was checked.
        raise TargetError(
            f"The targets include {sorted(config.target_parameters)}: experts packed into one parameter, whose tokens "
            'no mask can reach. Fix: name the attention, as in target_modules=["q_proj", "k_proj", "v_proj", "o_proj"].'
        )
    config.check_options()
    if isinstance(target, nn.Linear) and not gives_one_tensor(target):
        raise TargetError(
            f"`{target_name}` is a {type(target).__name__}, whose forward does not give one tensor of its out_features "
            "(a router): blocks could not be added to it. Fix: exclude_modules."
        )
    check_base_layer(target_name, target)
    # PEFT changes an attention module by building its layer around it.
    is_attention = isinstance(target, nn.MultiheadAttention)
    layer = None if is_attention else build_own_layer(target, adapter_name, config, target_name=target_name, **kwargs)
    if layer is None or not takes_blocks(layer):
        raise TargetError(
            f"`{target_name}` is a {type(target).__name__}, whose LoRA would have no quarantine. Only nn.Linear, "
            "Conv1D and bitsandbytes 8 / 4 bit linears have one. Fix: name other `target_modules`."
        )
    if getattr(target, "_hf_tp_plan", None) is not None:
        raise TargetError(f"`{target_name}` is tensor-parallel; its quarantine would not be. Fix: load it unsharded.")
    layer.__class__ = routed_class(type(layer))  # type: ignore[arg-type]
    layer.name, layer.stop_gradient = target_name, config.stop_gradient
    layer.lora_A_quarantine, layer.lora_B_quarantine = nn.ModuleDict(), nn.ModuleDict()
    layer.add_quarantine(adapter_name, config)
    routed: nn.Module = layer
    return routed
