"""Directions in the space of deployed gradients, made of numbers, and those gradients as rows."""

import dataclasses

import torch
from torch import Tensor, nn

import gradroute as gr
from gradroute._hashing import model_identity
from gradroute._protocol import routed_layers
from gradroute.directions import Provenance
from support.language_models import MADE_OF_NUMBERS

PARAMETER = dataclasses.replace(MADE_OF_NUMBERS, source="gradient", feature="parameter")
BOTTLENECK = dataclasses.replace(MADE_OF_NUMBERS, source="gradient", feature="bottleneck")
ACTIVATION = dataclasses.replace(MADE_OF_NUMBERS, source="activation", feature="bottleneck")


def deployed_row(layer: nn.Module) -> Tensor:
    """Gradients of A, then B (or of the gain), flattened one after the other."""
    return torch.cat([p.grad.flatten() for p in layer.block_parameters("deployed")])


def deployed_rows(model: nn.Module) -> dict[str, Tensor]:
    return {name: deployed_row(layer).clone() for name, layer in routed_layers(model).items()}


def quarantine_gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for _, p in gr.quarantine_parameters(model)]


def of_model(made: Provenance, model: nn.Module) -> Provenance:
    """`made`, of the base model of `model`."""
    return dataclasses.replace(made, model=model_identity(model))


def directions_of(rows: dict[str, Tensor], model: nn.Module, made: Provenance = PARAMETER) -> gr.Directions:
    """Directions with these rows; their pairs are the rows and their opposites."""
    sides = {name: r.sum(0, keepdim=True) for name, r in rows.items()}
    return gr.Directions(rows, sides, {name: -r for name, r in sides.items()}, of_model(made, model))


def drawn_directions(model: nn.Module, k: int = 1, seed: int = 0, made: Provenance = PARAMETER) -> gr.Directions:
    """k random orthonormal rows per module, as wide as its deployed gradient or its bottleneck."""
    generator = torch.Generator().manual_seed(seed)
    rows = {}
    for name, layer in routed_layers(model).items():
        parameters = list(layer.block_parameters("deployed"))
        d = layer.deployed.A.shape[0] if made.feature == "bottleneck" else sum(p.numel() for p in parameters)
        gauss = torch.randn(d, k, generator=generator, dtype=torch.float64)
        rows[name] = torch.linalg.qr(gauss).Q.T.to(parameters[0].dtype).contiguous()
    return directions_of(rows, model, made)
