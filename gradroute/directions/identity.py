"""Which base model is this? A fingerprint of frozen weights, so that directions are not used on another model."""

import hashlib

import torch
from torch import nn

from gradroute.protocol import RoutedLayer

_SAMPLES = 16


def model_identity(model: nn.Module) -> str:
    """SHA-256 over name, shape and evenly spaced values of every parameter outside the low-rank blocks.

    The same before and after `attach`; training the blocks does not change it.
    """
    blocks = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, RoutedLayer)
        for block in ("deployed", "quarantine")
        for parameter in module.block_parameters(block)
    }
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if id(parameter) in blocks:
            continue
        flat = parameter.detach().reshape(-1)
        count = min(_SAMPLES, flat.numel())
        index = torch.linspace(0, max(flat.numel() - 1, 0), count, dtype=torch.float64).long().to(flat.device)
        values = flat[index].double().cpu().tolist()
        digest.update(f"{name.replace('.base_layer', '')} {tuple(parameter.shape)} {values}".encode())
    return digest.hexdigest()
