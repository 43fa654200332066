"""Towers of both parametrizations after a backward: what a filter is applied to."""

import torch
from torch import nn

import gradroute as gr
from gradroute._protocol import routed_layers
from support.models import Tower, randomize_blocks, routed_tower

UPSTREAM = torch.randn(7, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def backward(model: nn.Module, seed: int = 1) -> None:
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    dtype = next(model.parameters()).dtype
    (model(x.to(dtype)) * UPSTREAM.to(dtype)).sum().backward()


def lora(dtype: torch.dtype = torch.float64) -> Tower:
    model = routed_tower(dtype)
    backward(model)
    return model


def gains(dtype: torch.dtype = torch.float64, **settings: object) -> Tower:
    torch.manual_seed(0)
    model = Tower().to(dtype)
    gr.attach(model, **{"r": 3, "lora_alpha": 4.0, "parametrization": "svd_gain", **settings})
    randomize_blocks(model)
    backward(model)
    return model


def layers_of(model: nn.Module) -> list[tuple[str, gr.adapters.SvdGain]]:
    return list(routed_layers(model).items())
