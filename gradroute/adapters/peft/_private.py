"""Everything that is read from private names of PEFT, in one file, so that a new version breaks in one place."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

QUANTISED = ("Linear8bitLt", "Linear4bit")
COMBINING = ("add_weighted_adapter", "reduce_intruder_dimension")


def inject_by(config: LoraConfig, factory: Callable[..., nn.Module]) -> None:
    """Have PEFT call `factory` for every target: the key nn.Module leaves none to become plain LoRA in silence."""
    config._register_custom_module({nn.Module: factory})  # type: ignore[dict-item]


def build_own_layer(target: nn.Module, adapter: str, config: LoraConfig, **options: Any) -> Any:
    """The layer that PEFT makes around `target` without `inject_by`."""
    factories, config._custom_modules = config._custom_modules, None
    try:
        create: Any = LoraModel._create_new_module
        return create(config, adapter, target, **options)
    finally:
        config._custom_modules = factories


def takes_blocks(layer: nn.Module) -> bool:
    """Whether a layer of PEFT computes W x + s B A D(x): nn.Linear, Conv1D, bitsandbytes 8 and 4 bit."""
    kind = type(layer)
    return kind is LoraLinear or (kind.__module__ == "peft.tuners.lora.bnb" and kind.__name__ in QUANTISED)


def quantised_class(name: str) -> type:
    """PEFT's layer for a bitsandbytes linear; bitsandbytes is slow to import."""
    import peft.tuners.lora.bnb as quantised  # noqa: PLC0415

    found: type = getattr(quantised, name)
    return found


def move_to_base(layer: Any, adapter: str) -> None:
    """Give an adapter of `layer` the device, and the floating point type, of its base weight."""
    layer._move_adapter_to_device_of_base_layer(adapter)


def combining() -> str | None:
    """The method of PEFT that combines adapters and is running now; None if none is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in COMBINING and "peft" in code.co_filename:
            return code.co_name
        frame = frame.f_back
    return None
