"""Which base model is this, and which directions? Hashes by which a card, a cache and a file know them."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradroute.protocol import RoutedLayer

_SAMPLES = 16


def model_identity(model: nn.Module) -> str:
    """SHA-256 over name, shape and evenly spaced values of every parameter of the base model.

    The same before and after `attach` or `get_peft_model`; training the blocks, or PEFT's `modules_to_save`, does not
    change it.
    """
    blocks = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, RoutedLayer)
        for block in ("deployed", "quarantine")
        for parameter in module.block_parameters(block)
    }
    base = {_base_name(name): p for name, p in model.named_parameters() if id(p) not in blocks and not _added(name)}
    digest = hashlib.sha256()
    for name, parameter in sorted(base.items()):
        flat = parameter.detach().reshape(-1)
        count = min(_SAMPLES, flat.numel())
        index = torch.linspace(0, max(flat.numel() - 1, 0), count, dtype=torch.float64).long().to(flat.device)
        values = flat[index].double().cpu().tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {values}".encode())
    return digest.hexdigest()


def rows_hash(groups: Mapping[str, Mapping[str, Tensor] | None]) -> str:
    """SHA-256 over name, shape and float64 values of tensors by kind ("rows", "scale") and module."""
    digest = hashlib.sha256()
    for kind, group in groups.items():
        for name, values in (group or {}).items():
            wide = values.detach().to("cpu", torch.float64).contiguous()
            digest.update(f"{kind} {name} {tuple(wide.shape)} ".encode() + wide.numpy().tobytes())
    return digest.hexdigest()


def _added(name: str) -> bool:
    """Whether PEFT put this parameter there: matrices of any adapter, trained copies of whole modules."""
    return any(part.startswith("lora_") or part == "modules_to_save" for part in name.split("."))


def _base_name(name: str) -> str:
    for wrapper in ("module.", "_orig_mod.", "base_model.model."):
        name = name.removeprefix(wrapper)
    return name.replace(".base_layer", "").replace(".original_module", "")
