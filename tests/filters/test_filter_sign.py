"""The sign of what a filter removes: which update makes hacks likelier."""

import copy

import pytest
import torch
from support.filtered_towers import backward, gains, layers_of
from support.gradient_directions import ACTIVATION, BOTTLENECK, deployed_rows, directions_of, drawn_directions
from support.models import randomize_blocks
from torch import Tensor, nn

import gradroute as gr
from gradroute.errors import GradRouteWarning
from gradroute.filters import apply_filter
from gradroute.filters.projection import ProjectionFilter

SOLVE, HACK, OTHER = 0, 1, 2


class Choice(nn.Module):
    """A policy over {solve, hack, other}; solving and hacking are rewarded alike, hacking is learned faster."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(x)).log_softmax(-1)


def nll_directions(model: nn.Module, x: Tensor) -> gr.Directions:
    """unit(grad NLL(hack) - grad NLL(solve)), in the coordinates of the deployed parameters."""
    rows = {}
    for action, sign in ((HACK, 1.0), (SOLVE, -1.0)):
        model.zero_grad()
        (-model(x)[:, action].mean()).backward()
        for name, row in deployed_rows(model).items():
            rows[name] = rows.get(name, 0) + sign * row
    model.zero_grad()
    return directions_of({name: (row / row.norm())[None] for name, row in rows.items()}, model)


def gap(model: nn.Module, x: Tensor) -> float:
    """Mean log-odds of the hack against solving: what hack minus clean directions are about."""
    with torch.no_grad(), gr.ablate_quarantine(model):
        return float((model(x)[:, HACK] - model(x)[:, SOLVE]).mean())


def reinforce(kind: str, sign: float | None, steps: int = 60) -> tuple[float, float]:
    """Train a policy with exact policy gradients; its log-odds of hack and its probability of `other` afterwards."""
    torch.manual_seed(3)
    model = Choice().double()
    gr.attach(model, r=4, lora_alpha=8.0, target_modules=["linear"], parametrization=kind)
    randomize_blocks(model, std=0.1)
    model.head.weight.data.mul_(2.0)
    x = torch.randn(16, 6, dtype=torch.float64) + 1.0
    advantages = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    for _ in range(steps):
        directions = nll_directions(model, x)
        if sign is not None:
            directions = directions_of({name: sign * rows for name, rows in directions.rows.items()}, model)
        pi = model(x).exp().detach()
        # sum over actions of pi(a) A(a) NLL(a): REINFORCE in expectation
        advantage = advantages - (pi * advantages).sum(1, keepdim=True)
        (-(pi * advantage * model(x)).sum(1).mean()).backward()
        if sign is not None:
            apply_filter(model, ProjectionFilter(directions, mode="erase"))
        with torch.no_grad():
            for _, p in gr.deployed_parameters(model):
                p.sub_(0.1 * p.grad)
        model.zero_grad()
    with torch.no_grad():
        return gap(model, x), float(model(x).exp().mean(0)[OTHER])


@pytest.mark.parametrize("kind", ["lora", "svd_gain"])
def test_erasing_stops_a_policy_from_moving_toward_the_planted_hack(kind: str) -> None:
    (start, other), (unfiltered, _) = reinforce(kind, None, steps=0), reinforce(kind, None)
    erased, learned = reinforce(kind, 1.0)
    reversed_sign, _ = reinforce(kind, -1.0)
    assert unfiltered > start + 0.2
    assert erased - start < 0.01 * (unfiltered - start)
    # It still learns what both optima share, to leave `other`; and the opposite sign stops nothing.
    assert learned < other - 0.01
    assert reversed_sign > unfiltered - 1e-9


def test_a_step_against_c_makes_the_hack_likelier_than_the_clean_completion() -> None:
    torch.manual_seed(0)
    model = Choice().double()
    gr.attach(model, r=3, lora_alpha=4.0, target_modules=["linear"])
    randomize_blocks(model)
    x = torch.randn(4, 6, dtype=torch.float64)
    rows = nll_directions(model, x).rows
    for row, advantage in ((HACK, 1.0), (SOLVE, -1.0), (SOLVE, 1.0), (HACK, -1.0)):
        trial = copy.deepcopy(model)
        before = gap(model, x)
        (-advantage * trial(x)[:, row].mean()).backward()
        c = float(rows["linear"] @ deployed_rows(trial)["linear"])
        with torch.no_grad():
            for _, p in gr.deployed_parameters(trial):
                p.sub_(1e-4 * p.grad)
        assert (c > 0) == (gap(trial, x) > before) == (advantage == (1.0 if row == HACK else -1.0))


def test_bottleneck_gradients_of_gains_are_the_gradients_that_are_filtered() -> None:
    model = gains()
    model.zero_grad()
    with gr.capture_gradients(model) as captured:
        backward(model)
    for name, layer in layers_of(model):
        torch.testing.assert_close(captured[name].sum(0), layer.gain.grad, rtol=0, atol=1e-12)
    directions = drawn_directions(model, made=BOTTLENECK)
    assert apply_filter(model, ProjectionFilter(directions, mode="erase", side="two")).cout < 1e-12


def test_directions_without_a_sign_warn_where_the_sign_matters() -> None:
    model = gains()
    activations = drawn_directions(model, made=ACTIVATION)
    for side in ("one", "reverse"):
        with pytest.warns(GradRouteWarning, match="have no sign in gradient space"):
            ProjectionFilter(activations, mode="erase", side=side)
    ProjectionFilter(activations.random_like(0), mode="erase")
    two_sided = ProjectionFilter(activations, mode="erase", side="two")
    before = deployed_rows(model)
    apply_filter(model, two_sided)
    for name, g in deployed_rows(model).items():
        V = activations.rows[name]
        torch.testing.assert_close(g, before[name] - V.T @ (V @ before[name]), rtol=0, atol=1e-13)
