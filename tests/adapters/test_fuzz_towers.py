"""Random towers under random masks, views and layouts against the formula in plain autograd, in float64.

    dA_d = sum over tokens of g_d * (the token's dA_d), and so on: each token has copies of A and B as leaves

In a third of the towers each, u_q or dz_q of the tokens that do not see the quarantine is infinite (NaN after the next
product): what a block does not see contributes nothing to it.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from support.models import gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradroute as gr

pytestmark = pytest.mark.slow

CASES = 60  # towers of each seed
BLOCKS = {"deployed": "", "quarantine": "_quarantine"}


@dataclass
class Case:
    """One random tower with its inputs, mask and view."""

    widths: list[int]
    ranks: tuple[int, int]
    lead: tuple[int, ...]
    mask: gr.RouteMask
    rows: Tensor | None
    scale: float
    checkpointed: bool | None
    overflow: str

    @classmethod
    def draw(cls, draw: random.Random, generator: torch.Generator) -> "Case":
        layout = draw.choice(["rows", "rows of tokens", "tokens", "packed", "rows of heads"])
        b, t, h = draw.randint(1, 5), draw.randint(1, 4), draw.randint(1, 3)
        lead = {"rows": (b,), "packed": (1, b * t), "rows of heads": (b, h, t)}.get(layout, (b, t))
        shape = lead if layout in ("tokens", "packed") else (b,)
        kind = draw.choice(["zones", "soft", "any"])
        if kind == "zones":
            mask = gr.RouteMask.zones(torch.randint(0, 3, shape, generator=generator))
        else:
            weights = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
            weights = weights.sigmoid() if kind == "soft" else weights
            mask = gr.RouteMask.weights(*torch.where(weights.abs() < 0.3, 0.0, weights))
        # Ablated rows may not train the quarantine; in part they may.
        rows = torch.rand(shape, generator=generator) < 0.5 if draw.random() < 0.4 else None
        scale = draw.choice([1.0, 1.0, draw.random()])
        if rows is not None and draw.random() < 0.5:
            rows, scale = rows & ~((mask.m != 0) & (mask.g_q != 0)), 0.0
        return cls(
            [draw.randint(1, 7) for _ in range(draw.randint(2, 4))],
            (draw.randint(1, 4), draw.randint(1, 4)), lead, mask, rows, scale,
            draw.choice([None, None, False, True]), draw.choice(["nothing", "forward", "backward"]),
        )  # fmt: skip

    def spread(self, weights: Tensor) -> Tensor:
        """One weight per token."""
        weights = weights.double().reshape(weights.shape + (1,) * (len(self.lead) - weights.ndim))
        return weights.expand(self.lead).reshape(-1)


class Tower(nn.Module):
    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        names = [f"layer_{chr(ord('a') + i)}" for i in range(len(widths) - 1)]
        self.layers = nn.ModuleDict({n: nn.Linear(*widths[i : i + 2], bias=i % 2 == 0) for i, n in enumerate(names)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = torch.tanh(layer(x))
        return x


def reference(model: Tower, x: Tensor, upstream: Tensor, m: Tensor, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs, the gradient of x and the gated gradients of all A and B, every token with its own copies."""
    x, leaves = x.reshape(-1, x.shape[-1]).clone().requires_grad_(), {}
    y = x
    for name, layer in model.layers.items():
        base = y @ layer.base_layer.weight.T + (0 if layer.base_layer.bias is None else layer.base_layer.bias)
        for block, suffix in BLOCKS.items():
            A, B = (getattr(layer, f"lora_{factor}{suffix}") for factor in "AB")
            weight = m if block == "quarantine" else torch.ones_like(m)
            seen = weight != 0
            A, B = (p.detach().expand(len(y), *p.shape)[seen].clone().requires_grad_() for p in (A, B))
            leaves[f"layers.{name}.lora_A{suffix}"] = (A, block, seen)
            leaves[f"layers.{name}.lora_B{suffix}"] = (B, block, seen)
            u = torch.einsum("tri,ti->tr", A, y[seen])
            z = weight[seen, None] * layer.lora_alpha / A.shape[1] * torch.einsum("tor,tr->to", B, u)
            base = base.index_add(0, seen.nonzero().squeeze(1), z)
        y = torch.tanh(base)
    (y * upstream.reshape(y.shape)).sum().backward()
    found = {"output": y.detach(), "input": x.grad}
    for name, (leaf, block, seen) in leaves.items():
        gate = gates[block][seen]
        trains = gate != 0
        found[name] = torch.einsum("t,tab->ab", gate[trains], leaf.grad[trains])
    return found


@pytest.mark.parametrize("seed", range(10))
def test_random_towers_equal_the_formula(seed: int) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(CASES):
        case = Case.draw(draw, generator)
        compare(case, generator)


def compare(case: Case, generator: torch.Generator) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    torch.manual_seed(int(torch.randint(0, 10**6, (1,), generator=generator)))
    model = Tower(case.widths).double()
    r, r_quarantine = case.ranks
    gr.attach(model, r=r, r_quarantine=r_quarantine, lora_alpha=3.0)
    for _, parameter in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]:
        parameter.data = 0.5 * normal(*parameter.shape)
    x, upstream = normal(*case.lead, case.widths[0]).requires_grad_(), normal(*case.lead, case.widths[-1])
    m = case.spread(case.mask.m)
    if case.rows is not None:
        m = m * case.spread(torch.where(case.rows, torch.tensor(case.scale, dtype=torch.float64), 1.0))
    gates = {"deployed": case.spread(case.mask.g_d), "quarantine": case.spread(case.mask.g_q)}
    overflow(case, model, x, upstream, hidden=m == 0)
    expected = reference(model, x.detach(), upstream, m, gates)

    with gr.ablate_quarantine(model, case.scale if case.rows is not None else 1.0, rows=case.rows):
        with gr.route(model, case.mask):
            y = model(x) if case.checkpointed is None else checkpoint(model, x, use_reentrant=case.checkpointed)
            (y * upstream).sum().backward()
    found = {"output": y.detach().reshape(-1, y.shape[-1]), "input": x.grad.reshape(-1, x.shape[-1])}
    found |= gradients(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if case.overflow == "forward" and (name == "input" or name.startswith("layers.layer_a.lora_A")):
            value, found[name] = value[:, 1:], found[name][:, 1:]  # noqa: PLW2901  (the huge column would hide the rest)
        assert torch.isfinite(value).all(), (case, name)
        error = ((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)) if value.numel() else 0.0
        assert error <= 1e-10, (case, name, error)


def overflow(case: Case, model: Tower, x: Tensor, upstream: Tensor, hidden: Tensor) -> None:
    """Make u_q of the lowest layer infinite in the tokens that do not see the quarantine, or dz_q of the highest."""
    lower, *_, upper = [*model.layers.values(), *model.layers.values()]
    with torch.no_grad():
        if case.overflow == "forward":
            lower.lora_A_quarantine[:, 0] = 1e250
            lower.lora_A[:, 0] = lower.base_layer.weight[:, 0] = 0.0
            x[..., 0] = 1e100 * hidden.double().reshape(case.lead)
        elif case.overflow == "backward":
            # Where the quarantine is seen, this output is saturated and has no gradient.
            upper.lora_B_quarantine[0] = 1e200
            upstream[..., 0].masked_fill_(hidden.reshape(case.lead), 1e200)
