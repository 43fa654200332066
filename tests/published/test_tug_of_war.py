"""The two-parameter tug-of-war of gradient routing, on a routed layer of one weight.

    retain: (theta_0 + theta_1 - 2)^2      forget: (sg(theta_0) + theta_1 - 1)^2      coherence: c (theta_0 - 2)^2

Published: SGD at .01; c = 0: the sum tends to 5/3 and theta_0 drifts by +.00667 a step; c = .2: (4.5, -3.0).
Source: Cloud et al. 2024 (arXiv:2410.04332), appendix A, "internal tug of war"; the system is that of the script
`projects/tinystories/explore_tug_of_war.py` in the paper's repository, where the numbers follow from its losses:
retain rows absorb, forget rows are routed, and the coherence term is a retain row in the keep zone, weighed by c.
"""

import pytest
import torch
from torch import Tensor, nn

import gradroute as gr

RETAIN, FORGET, LEARNING_RATE = 2.0, 1.0, 0.01
Point = tuple[float, float]
START: Point = (4.0, -3.0)


def trajectory(
    zones: list[str],
    targets: list[float],
    weights: list[float],
    *,
    steps: int,
    lr: float = LEARNING_RATE,
    start: Point = START,
) -> Tensor:
    """(steps + 1, 2): theta_0, the deployed block's only weight, and theta_1, the quarantine's, under SGD."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    layer = gr.attach(model, r=1, lora_alpha=1.0)[0]
    with torch.no_grad():
        for A in (layer.lora_A, layer.lora_A_quarantine):
            A.fill_(1.0).requires_grad_(False)
        layer.lora_B.fill_(start[0])
        layer.lora_B_quarantine.fill_(start[1])
    optimizer = torch.optim.SGD([layer.lora_B, layer.lora_B_quarantine], lr=lr)
    mask, x = gr.RouteMask.zones(zones), torch.ones(len(zones), 1, dtype=torch.float64)
    y, weight = (torch.tensor(values, dtype=torch.float64)[:, None] for values in (targets, weights))
    points = [[layer.lora_B.item(), layer.lora_B_quarantine.item()]]
    for _ in range(steps):
        optimizer.zero_grad()
        with gr.route(model, mask):
            (weight * (model(x) - y).square()).sum().backward()
        optimizer.step()
        points.append([layer.lora_B.item(), layer.lora_B_quarantine.item()])
    return torch.tensor(points, dtype=torch.float64)


def tug_of_war(c: float, forget: str = "route", **settings: object) -> Tensor:
    """The published system; `forget` is the zone of the forget row."""
    return trajectory(["absorb", forget, "keep"], [RETAIN, FORGET, RETAIN], [1.0, 1.0, c], **settings)  # type: ignore[arg-type]


def by_hand(c: float, steps: int) -> Tensor:
    """The recurrence, number by number."""
    a, b = START
    points = [(a, b)]
    for _ in range(steps):
        retain, forget, coherence = 2 * (a + b - RETAIN), 2 * (a + b - FORGET), 2 * c * (a - RETAIN)
        a, b = a - LEARNING_RATE * (retain + coherence), b - LEARNING_RATE * (retain + forget)
        points.append((a, b))
    return torch.tensor(points, dtype=torch.float64)


@pytest.mark.parametrize("c", [0.0, 0.2])
def test_a_routed_layer_follows_the_recurrence(c: float) -> None:
    found, expected = tug_of_war(c, steps=300), by_hand(c, 300)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (tug_of_war(c, forget="absorb", steps=300) - expected).abs().max() > 0.1


@pytest.mark.parametrize("start", [START, (-3.0, 1.0)])
def test_without_coherence_the_sum_tends_to_five_thirds_and_theta_0_drifts_for_ever(start: Point) -> None:
    points = tug_of_war(0.0, steps=500, start=start)
    assert points[-1].sum().item() == pytest.approx(5 / 3, abs=1e-12)
    drift = points[400:].diff(dim=0)
    assert drift[:, 0].tolist() == pytest.approx([2 / 300] * 100, abs=1e-10)
    assert drift[:, 1].tolist() == pytest.approx([-2 / 300] * 100, abs=1e-10)
    assert round(drift[-1, 0].item(), 5) == 0.00667


def test_without_routing_the_sum_meets_in_the_middle_and_nothing_drifts() -> None:
    points = tug_of_war(0.0, forget="absorb", steps=500)
    assert points[-1].sum().item() == pytest.approx((RETAIN + FORGET) / 2, abs=1e-12)
    assert points[400:].diff(dim=0).abs().max() < 1e-9


@pytest.mark.parametrize("start", [START, (-3.0, 1.0)])
def test_with_coherence_theta_tends_to_the_published_point(start: Point) -> None:
    """At thirty times the published rate, which moves no fixed point: the slow mode decays by 7.8 % a step."""
    points = tug_of_war(0.2, steps=300, lr=0.3, start=start)
    assert points[-1].tolist() == pytest.approx([4.5, -3.0], abs=1e-8)


def test_with_coherence_and_without_routing_theta_0_reaches_the_retain_target() -> None:
    points = tug_of_war(0.2, forget="absorb", steps=250, lr=0.2)
    assert points[-1].tolist() == pytest.approx([2.0, -0.5], abs=1e-3)


def test_what_is_deployed_misses_the_retain_target_unless_retain_rows_are_kept() -> None:
    """theta_0 alone answers when the quarantine is ablated: 4.5 for 2 with absorbed retain rows, 2 with kept ones."""
    absorbed = tug_of_war(0.2, steps=300, lr=0.3)[-1, 0].item()
    kept = trajectory(["keep", "route"], [RETAIN, FORGET], [1.0, 1.0], steps=60, lr=0.2)[-1]
    assert absorbed == pytest.approx(4.5, abs=1e-8)
    assert kept.tolist() == pytest.approx([RETAIN, FORGET - RETAIN], abs=1e-8)
