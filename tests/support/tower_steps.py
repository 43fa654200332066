"""Steps of an optimizer on a routed tower, copies of its blocks, and directions in the space of the deployed one."""

import torch
from torch import Tensor, nn

import gradroute as gr
from support.gradient_directions import PARAMETER, of_model

REFUSED = (gr.GradRouteError, TypeError)
ZONES = {"keep": [0] * 4, "absorb": [1] * 4, "route": [2] * 4, "mixed": [0, 1, 2, 0]}


def blocks(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """A copy of both blocks' parameters."""
    return {
        "deployed": {name: p.detach().clone() for name, p in gr.deployed_parameters(model)},
        "quarantine": {name: p.detach().clone() for name, p in gr.quarantine_parameters(model)},
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]]


def adamw(model: nn.Module, **settings: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(model), **{"lr": 0.01, "weight_decay": 0.1, **settings})


def inputs(seed: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def backward(model: nn.Module, zones: str | None, seed: int = 0) -> None:
    if zones is None:
        model(inputs(seed)).square().sum().backward()
        return
    with gr.route(model, gr.RouteMask.zones(torch.tensor(ZONES[zones]))):
        model(inputs(seed)).square().sum().backward()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, zones: str | None, seed: int = 0) -> None:
    optimizer.zero_grad()
    backward(model, zones, seed)
    optimizer.step()


def parameter_directions(model: nn.Module, k: int = 1, seed: int = 0) -> gr.Directions:
    """k orthonormal rows per module, as wide as the deployed parameters together."""
    generator = torch.Generator().manual_seed(seed)
    widths = {name: sum(p.numel() for p in layer.block_parameters("deployed")) for name, layer in layers(model).items()}
    rows = {
        name: torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64)).Q.T.contiguous()
        for name, d in widths.items()
    }
    hack = {name: torch.ones(2, d, dtype=torch.float64) for name, d in widths.items()}
    clean = {name: torch.zeros(2, d, dtype=torch.float64) for name, d in widths.items()}
    return gr.Directions(rows, hack, clean, of_model(PARAMETER, model))


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {"lower": model.lower, "upper": model.upper}


def row(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def deployed_row(model: nn.Module) -> dict[str, Tensor]:
    return {name: row(list(layer.block_parameters("deployed"))) for name, layer in layers(model).items()}
