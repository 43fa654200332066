"""The share of a gradient along k random orthonormal rows of width r: the null that every cin has to be seen against.

    cin = |relu(V g)| / |g|: sqrt(k / 2r) one-sided;      |V g| / |g|: sqrt(k / r) two-sided

Published as "about"; source: grpo_proj2 (wassname), prior-art formula 7. Exact is E[cin^2] = k / 2r and k / r, that is,
the root mean square. The mean is lower: for k = 1 it is E|cos| = Gamma(r/2) / (sqrt(pi) Gamma((r+1)/2)), halved for one
side: 1 / sqrt(pi) = .56 of the null as r grows. The null is a root mean square, never a typical value of one draw.

LoRA matrices and `share` against the null are in test_filters.py and test_diagnostics.py; here are gains, on which the
formula was published, by this library's own random controls, and the 95th percentile that a summary prints.
"""

import math

import pytest
import torch
from support.gradient_directions import BOTTLENECK, directions_of
from torch import Tensor, nn

import gradroute as gr
from gradroute._protocol import routed_layers
from gradroute.directions import summary

R, DRAWS = 8, 150
SIDES = {"one": 2, "two": 1}


def gain_model() -> nn.Module:
    """Two layers of r = 8 gains, after a backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 9)).double()
    gr.attach(model, r=R, lora_alpha=8.0, parametrization="svd_gain")
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    (model(x) * torch.randn(6, 9, generator=generator, dtype=torch.float64)).sum().backward()
    return model


def planted(model: nn.Module, k: int) -> gr.Directions:
    """k rows per module of which the first is the gradient itself: cin = 1, as far from the null as can be."""
    rows = {}
    for name, layer in routed_layers(model).items():
        g = layer.gain.grad
        rest = torch.randn(R, k - 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        Q = torch.linalg.qr(torch.cat([g[:, None], rest], 1)).Q.T
        rows[name] = (Q * torch.sign(Q @ g)[:, None].where(torch.arange(k)[:, None] == 0, 1.0)).contiguous()
    return directions_of(rows, model, BOTTLENECK)


def measured(model: nn.Module, directions: gr.Directions, side: str) -> gr.filters.FilterStats:
    return gr.apply_filter(model, gr.ProjectionFilter(directions, mode="measure", side=side))  # type: ignore[arg-type]


def assert_mean(values: Tensor, expected: float) -> None:
    """Within four standard errors, which are small against what is expected."""
    error = values.std() / math.sqrt(len(values))
    assert error < 0.15 * expected
    assert abs(values.mean() - expected) < 4 * error


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("k", [1, 4])
def test_random_controls_on_gains_have_the_published_null_in_the_mean_square(side: str, k: int) -> None:
    model = gain_model()
    directions = planted(model, k)
    expected = k / (SIDES[side] * R)
    assert measured(model, directions, side).cin == pytest.approx(1.0)
    stats = [measured(model, directions.random_like(seed), side) for seed in range(DRAWS)]
    for found in (measured(model, directions, side), *stats):
        assert found.null == pytest.approx(math.sqrt(expected), abs=1e-12)
        assert all(module.null == pytest.approx(math.sqrt(expected), abs=1e-12) for module in found.modules.values())
    modules = torch.tensor([[m.cin for m in s.modules.values()] for s in stats], dtype=torch.float64)
    assert_mean(modules.square().flatten(), expected)
    # Pooled, a module weighs by its squared gradient; here all have one null.
    assert_mean(torch.tensor([s.cin**2 for s in stats], dtype=torch.float64), expected)


def test_the_other_sides_null_is_refuted() -> None:
    """What the check above can see: sqrt(k / r) is not the one-sided null, at the same number of draws."""
    model = gain_model()
    draws = [measured(model, planted(model, 1).random_like(seed), "one").cin ** 2 for seed in range(DRAWS)]
    with pytest.raises(AssertionError):
        assert_mean(torch.tensor(draws), 1 / R)


@pytest.mark.parametrize("side", SIDES)
def test_the_mean_of_a_single_rows_share_is_well_below_its_null(side: str) -> None:
    model = gain_model()
    stats = [measured(model, planted(model, 1).random_like(seed), side) for seed in range(DRAWS)]
    shares = torch.tensor([[m.cin for m in s.modules.values()] for s in stats], dtype=torch.float64).flatten()
    mean = math.gamma(R / 2) / (math.sqrt(math.pi) * math.gamma((R + 1) / 2)) / SIDES[side]
    assert_mean(shares, mean)
    null = math.sqrt(1 / (SIDES[side] * R))
    assert mean / null == pytest.approx({"one": 0.58, "two": 0.82}[side], abs=0.01)


def test_the_random_percentile_of_a_summary_is_exceeded_by_one_random_control_in_twenty() -> None:
    """Its null is the one-sided one; 95 % of the random controls have a share below its 95th percentile."""
    k, generator = 3, torch.Generator().manual_seed(3)
    pairs = [torch.randn(5, R, generator=generator, dtype=torch.float64) for _ in range(2)]
    rows = torch.linalg.qr(torch.randn(R, k, generator=generator, dtype=torch.float64)).Q.T.contiguous()
    directions = gr.Directions({"m": rows}, {"m": pairs[0] + 4 * rows.sum(0)}, {"m": pairs[1]}, BOTTLENECK)
    measured_rows = summary(directions, draws=1000).modules["m"]
    assert measured_rows.null == pytest.approx(math.sqrt(k / (2 * R)), abs=1e-12)
    assert measured_rows.share > measured_rows.random > measured_rows.null
    draws = 200
    found = [summary(directions.random_like(seed), draws=1).modules["m"] for seed in range(draws)]
    shares = torch.tensor([module.share for module in found], dtype=torch.float64)
    assert_mean(shares.square(), measured_rows.null**2)
    exceeding = int((shares > measured_rows.random).sum())
    # 10 expected; the ends are those of a binomial at 4 standard deviations, the percentile's own error included.
    assert 1 <= exceeding <= 25
