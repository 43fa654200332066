"""ZeRO stage 3 and routed layers: DeepSpeed gathers the parameters of the modules that are called.

A layer of PEFT holds its matrices in small linears, which a routed layer reads and never calls.
"""

from torch import nn

from gradroute._protocol import routed_layers


def register_blocks(model: nn.Module) -> nn.Module:
    """Have ZeRO-3 gather the blocks of each routed layer in that layer's own forward and backward; returns `model`.

    Call it once, with all adapters in place, before `deepspeed.initialize`. The TRL trainer does so itself. Stages 1
    and 2 do not need it.

    Args:
        model: with routed layers.

    Raises:
        GradRouteError: `model` has no routed layers.
        ImportError: DeepSpeed is not installed.
    """
    import deepspeed  # noqa: PLC0415 - slow to import, and not for all

    for layer in routed_layers(model).values():
        for name, parameter in layer.named_parameters():
            # Its own parameters are gathered anyway, and the base layer is called.
            if "." in name and not name.startswith("base_layer."):
                deepspeed.zero.register_external_parameter(layer, parameter)
    return model
