"""Parameter-only gating: one mixed pass gives the gradients of one pass per class.

    out = g(x) - (1 - m) g(sg x) + (1 - m) sg(g(x)):   value g(x), parameter gradient times m, gradient to x whole

Published: equal to per-class passes to 1e-14 in float64; detaching the branch instead makes lower-layer quarantine
gradients wrong by 2 % to 46 % as the deltas grow; in bf16 the sum rounds, by .4 % at m = 4 and up to 4 % at m = 10.7.
Source: shawnghu/small-rl, prior-art formula 5. Here the gate sits in the backward of `quarantine_lora`. Per-class
passes use no gate at all: the blocks that a class may not train do not require a gradient.
"""

from collections.abc import Callable

import pytest
import torch
from support.models import gradients, randomize_blocks
from torch import Tensor, nn

import gradroute as gr
from gradroute._protocol import Block, routed_layers

CLASSES = {"keep": (1.0, 0.0), "absorb": (1.0, 1.0), "route": (0.0, 1.0)}
ZONES = ["keep", "route", "absorb", "route", "absorb", "keep", "route", "absorb"]
N = len(ZONES)


def tower(std: float = 0.5, stop_gradient: str = "parameters") -> nn.Module:
    """Three routed linears with B of standard deviation `std`; the lower two are reached through those above."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    gr.attach(model, r=2, r_quarantine=3, lora_alpha=4.0, stop_gradient=stop_gradient)  # type: ignore[arg-type]
    randomize_blocks(model)
    with torch.no_grad():
        for layer in routed_layers(model).values():
            for block in (layer.deployed, layer.quarantine):
                block.B.mul_(std / 0.5)
    return model


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(N, width, generator=generator, dtype=torch.float64) for width in (5, 4))  # type: ignore[return-value]


def mixed_pass(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    x, upstream = inputs()
    with gr.route(model, gr.RouteMask.zones(ZONES)):
        (model(x) * upstream).sum().backward()
    return gradients(model)


def per_class_passes(model: nn.Module) -> dict[str, Tensor]:
    """One ungated forward and backward per class; in the keep class the quarantine is absent from the formula."""
    x, upstream = inputs()
    total: dict[str, Tensor] = {}
    deployed = {name for name, _ in gr.deployed_parameters(model)}
    trained = dict([*gr.deployed_parameters(model), *gr.quarantine_parameters(model)])
    for zone, trains in CLASSES.items():
        rows = torch.tensor([z == zone for z in ZONES])
        hidden = x[rows]
        learning = {name: p for name, p in trained.items() if trains[0 if name in deployed else 1]}
        for module in model:
            if isinstance(module, gr.QuarantineLoRA):
                blocks = [module.deployed] if zone == "keep" else [module.deployed, module.quarantine]
                base = module.base_layer(hidden)
                hidden = base + sum(s * (hidden @ A.T @ B.T) for A, B, s in blocks)
            else:
                hidden = module(hidden)
        loss = (hidden * upstream[rows]).sum()
        for (name, _), gradient in zip(
            learning.items(), torch.autograd.grad(loss, list(learning.values())), strict=True
        ):
            total[name] = total.get(name, torch.zeros_like(gradient)) + gradient
    return total


def worst(found: dict[str, Tensor], expected: dict[str, Tensor], names: Callable[[str], bool] = bool) -> float:
    """Largest |found - expected| / |expected| over the parameters, norms over each parameter's entries."""
    assert found.keys() == expected.keys()
    errors = [(found[n] - expected[n]).norm() / expected[n].norm() for n in expected if names(n)]
    return max(float(error) for error in errors)


def is_lower_quarantine(name: str) -> bool:
    return "quarantine" in name and not name.startswith("4.")


def test_one_mixed_pass_equals_per_class_passes_to_1e_14() -> None:
    model = tower()
    assert all(layer.deployed.B.any() and layer.quarantine.B.any() for layer in routed_layers(model).values())
    expected = per_class_passes(model)
    assert worst(mixed_pass(tower(stop_gradient="branch")), expected) > 0.02
    assert worst(mixed_pass(model), expected) < 1e-14


def test_the_error_of_branch_detaching_grows_with_the_deltas_through_the_published_range() -> None:
    """Beyond these sizes the tanh saturate, and the error, .2 to 2, grows no further; the gate stays at rounding."""
    sizes = [0.001, 0.003, 0.01, 0.03, 0.1]
    expected = [per_class_passes(tower(size)) for size in sizes]
    errors = [
        worst(mixed_pass(tower(size, "branch")), e, is_lower_quarantine)
        for size, e in zip(sizes, expected, strict=True)
    ]
    assert all(worst(mixed_pass(tower(size)), e) < 1e-14 for size, e in zip(sizes, expected, strict=True))
    assert errors == sorted(errors)
    assert errors[0] < 0.02
    assert errors[-1] > 0.46


# The published sum, written out


def published_sum(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
    g = x @ A.T @ B.T
    through_parameters_only = x.detach() @ A.T @ B.T
    return g - (1 - m) * through_parameters_only + (1 - m) * g.detach()


def tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"x": (64, 16), "A": (4, 16), "B": (8, 4), "upstream": (64, 8)}
    drawn = {name: torch.randn(*shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: t.to(dtype).requires_grad_(name != "upstream") for name, t in drawn.items()}


def by_the_library(t: dict[str, Tensor], weight: Tensor) -> Tensor:
    """The same block as a quarantine next to a deployed block of zeros."""
    zeros = Block(torch.zeros_like(t["A"]), torch.zeros_like(t["B"]), 1.0)
    base = t["x"].new_zeros(64, 8)
    return gr.adapters.quarantine_lora(t["x"], base, zeros, Block(t["A"], t["B"], 1.0), g_q=weight)


def test_in_float64_the_published_sum_and_the_backward_of_the_library_agree() -> None:
    t = tensors(torch.float64)
    weight = torch.linspace(-1, 4, 64, dtype=torch.float64)
    wanted = [t["x"], t["A"], t["B"]]
    ours = torch.autograd.grad(by_the_library(t, weight), wanted, t["upstream"])
    plain = torch.autograd.grad(t["x"] @ t["A"].T @ t["B"].T, wanted, t["upstream"])
    theirs = torch.autograd.grad(published_sum(t["x"], t["A"], t["B"], weight[:, None]), wanted, t["upstream"])
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 1e-14 * b.norm()
    assert (ours[0] - plain[0]).norm() < 1e-14 * plain[0].norm()
    assert all((a - b).norm() > 0.1 * b.norm() for a, b in zip(ours[1:], plain[1:], strict=True))


@pytest.mark.parametrize(("m", "typical", "largest"), [(4.0, 0.004, 0.012), (10.7, 0.015, 0.04)])
def test_in_bf16_the_published_sum_changes_the_value_and_the_library_does_not(
    m: float, typical: float, largest: float
) -> None:
    """Median and largest relative deviation: the .4 % published at m = 4 is the former, the 4 % at 10.7 the latter."""
    t = tensors(torch.bfloat16)
    plain = by_the_library(t, torch.ones(64, dtype=torch.bfloat16))
    assert torch.equal(by_the_library(t, torch.full((64,), m)), plain)
    value = t["x"] @ t["A"].T @ t["B"].T
    summed = published_sum(t["x"], t["A"], t["B"], torch.full((64, 1), m, dtype=torch.bfloat16))
    # Values near zero, relative to which any rounding is large, are left out.
    relative = ((summed - value).abs() / value.abs()).float()[value.abs() > 0.01]
    assert relative.median().item() == pytest.approx(typical, rel=0.25)
    assert relative.max().item() == pytest.approx(largest, rel=0.25)
