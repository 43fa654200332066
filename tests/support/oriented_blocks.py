"""A tower to initialise, paired input differences for it, and the directions in its blocks."""

import math

import torch
from torch import Tensor, nn

import gradroute as gr
from gradroute._protocol import Block
from support.models import Tower, normal

D_IN, D_HIDDEN, D_OUT = 12, 10, 8


def attached(dtype: torch.dtype = torch.float64, r: int = 4, r_quarantine: int | None = None, **settings) -> Tower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tower(D_IN, D_HIDDEN, D_OUT).to(dtype)
    return gr.attach(model, r=r, r_quarantine=r_quarantine, lora_alpha=6.0, **settings)


def differences(seed: int = 0, pairs: int = 6) -> dict[str, Tensor]:
    """Paired input differences with a mean of their own."""
    return {
        name: normal(pairs, d, seed=seed + i) + 2 * normal(1, d, seed=seed + 10 + i)
        for i, (name, d) in enumerate({"lower": D_IN, "upper": D_HIDDEN}.items())
    }


def layers(model: nn.Module) -> list[gr.QuarantineLoRA]:
    return [model.lower, model.upper]


def blocks(model: nn.Module) -> list[Block]:
    return [block for layer in layers(model) for block in (layer.deployed, layer.quarantine)]


def values(model: nn.Module) -> dict[str, Tensor]:
    both = (*gr.deployed_parameters(model), *gr.quarantine_parameters(model))
    return {name: p.detach().clone() for name, p in both}


def V(block: Block) -> Tensor:
    """Input directions, as rows."""
    return block.A.detach()[: math.ceil(len(block.A) / 2)]


def U(block: Block) -> Tensor:
    """Output directions, as columns."""
    return block.B.detach()[:, math.ceil(len(block.A) / 2) :]


def same_up_to_sign(found: Tensor, expected: Tensor, atol: float = 1e-9) -> bool:
    """Row by row."""
    cosines = (found * expected).sum(1).sign()[:, None]
    return torch.allclose(found, cosines * expected, rtol=0, atol=atol)


def cosine(a: Tensor, b: Tensor) -> float:
    return torch.cosine_similarity(a, b, dim=0).abs().item()
