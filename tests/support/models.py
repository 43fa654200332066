"""Small models with non-zero blocks, numbers for them, and slow references to compare with."""

import torch
from torch import Tensor, nn

import gradroute as gr


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Drawn in float64, so that every dtype has the same numbers but for rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Tower(nn.Module):
    """Two linears with a nonlinearity between them; the upper one's input gradient feeds the lower one."""

    def __init__(self, d_in: int = 5, d_hidden: int = 6, d_out: int = 4) -> None:
        super().__init__()
        self.lower = nn.Linear(d_in, d_hidden)
        self.upper = nn.Linear(d_hidden, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.upper(torch.tanh(self.lower(x)))


def randomize_blocks(model: nn.Module, seed: int = 0, std: float = 0.5) -> nn.Module:
    """Give every A and B random values: with B = 0 most of what is tested would be zero on both sides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(std * values)
    return model


def routed_tower(dtype: torch.dtype = torch.float64, seed: int = 0, **attach_arguments: object) -> Tower:
    """A tower with a rank 2 deployed and a rank 3 quarantine block on both linears, all non-zero."""
    torch.manual_seed(seed)
    model = Tower().to(dtype)
    gr.attach(model, **{"r": 2, "r_quarantine": 3, "lora_alpha": 4.0, **attach_arguments})
    return randomize_blocks(model, seed)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference_forward(layer: gr.QuarantineLoRA, x: Tensor, m: Tensor) -> Tensor:
    """The formula of the layer, in plain autograd; m has one value per row."""
    deployed, quarantine = layer.deployed, layer.quarantine
    y = layer.base_layer(x) + deployed.scaling * (x @ deployed.A.T @ deployed.B.T)
    return y + m[:, None] * quarantine.scaling * (x @ quarantine.A.T @ quarantine.B.T)


def reference_gradients(
    model: Tower, x: Tensor, upstream: Tensor, m: Tensor, g_d: Tensor, g_q: Tensor
) -> dict[str, Tensor]:
    """Routed gradients by brute force: an ungated backward per row, whose parameter gradients are then weighted."""
    total: dict[str, Tensor] = {}
    deployed = {name for name, _ in gr.deployed_parameters(model)}
    trained = [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]
    for i in range(len(x)):
        row = slice(i, i + 1)
        hidden = torch.tanh(reference_forward(model.lower, x[row], m[row]))
        loss = (reference_forward(model.upper, hidden, m[row]) * upstream[row]).sum()
        for (name, _), gradient in zip(trained, torch.autograd.grad(loss, [p for _, p in trained]), strict=True):
            weight = g_d[i] if name in deployed else g_q[i]
            total[name] = total.get(name, torch.zeros_like(gradient)) + weight * gradient
    return total
