"""Which values do the blocks have now? For a refresh, whether they moved; for a cache, which file is theirs."""

import hashlib

import torch
from safetensors.torch import save
from torch import nn

from gradroute.adapters.attach import deployed_parameters
from gradroute.protocol import BlockName, routed_layers


def deployed_fingerprint(model: nn.Module) -> list[int]:
    """A checksum over the bits of each deployed parameter: any change shows, and no copy is kept."""
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = [p.detach().reshape(-1).view(sizes[p.element_size()]).long() for _, p in deployed_parameters(model)]
    # Weighted by position, so that values which change places show too; int64 wraps around.
    return [int((b * torch.arange(1, 2 * b.numel(), 2, device=b.device)).sum()) for b in bits]


def trained_hash(model: nn.Module) -> str:
    """SHA-256 over name, shape, type and bytes of both blocks of every layer, and of all else that is trained."""
    blocks: tuple[BlockName, ...] = ("deployed", "quarantine")
    in_blocks = {id(p) for layer in routed_layers(model).values() for b in blocks for p in layer.block_parameters(b)}
    values = {
        name: parameter.detach().cpu().contiguous().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or id(parameter) in in_blocks
    }
    return hashlib.sha256(save(values)).hexdigest()
