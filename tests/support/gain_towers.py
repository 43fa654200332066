"""Towers with gains on their singular directions, and a batch for them."""

import pytest
import torch
from torch import nn

import gradroute as gr
from support.models import Tower, normal, randomize_blocks

R, R_Q, ALPHA = 2, 3, 4.0
ZONES = ["keep", "absorb", "route", "absorb"]
MASK = gr.RouteMask.zones(ZONES)
both_rotations = pytest.mark.parametrize("rotate", [False, True])
X, UPSTREAM = normal(4, 5, seed=1), normal(4, 4, seed=2)


def attached(dtype: torch.dtype = torch.float64, **settings: object) -> Tower:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tower().to(dtype)
    defaults = {"r": R, "r_quarantine": R_Q, "lora_alpha": ALPHA, "parametrization": "svd_gain"}
    return gr.attach(model, **{**defaults, **settings})


def trained(rotate: bool = False, **settings: object) -> Tower:
    """Gains, and the rotation's entries, drawn at random."""
    return randomize_blocks(attached(rotate=rotate, **settings), seed=3)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {**dict(gr.deployed_parameters(model)), **dict(gr.quarantine_parameters(model))}
