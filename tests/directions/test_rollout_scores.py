"""`RolloutFilter`: scores and figures of rollouts, how gates decide by them, and the memory that is kept."""

import math

import pytest
import torch
from support.gradient_directions import BOTTLENECK, PARAMETER, deployed_row, directions_of, drawn_directions
from support.language_models import routed_mixer
from support.models import gradients, randomize_blocks
from support.rollout_losses import (
    ADVANTAGES,
    IDS,
    ROWS,
    assert_same,
    both_features,
    losses,
    own_gradients,
    routed_backward,
)
from torch import Tensor, nn

import gradroute as gr
from gradroute._protocol import routed_layers
from gradroute.directions import reversed_sign
from gradroute.filters import apply_filter
from gradroute.filters.rollout import RolloutFilter

# Figures


def test_figures_are_those_of_the_summed_gradients_and_of_each_source() -> None:
    model = routed_mixer()
    directions = drawn_directions(model)
    own = own_gradients(model, losses)
    labels = ["student", "teacher", "student", "teacher", "teacher", "student"]
    removed = torch.tensor([1.0, 0, 0.5, 0, 1, 0], dtype=torch.float64)
    f = RolloutFilter(directions, lambda scores: removed)
    with f.record(model, sources=labels):
        losses(model).sum().backward()
    stats = apply_filter(model, f)

    def share(rows: list[int], weights: Tensor) -> float:
        hack = whole = 0.0
        for name, v in directions.rows.items():
            g = sum(weights[i] * own[i][name] for i in rows)
            hack, whole = hack + max(float(v[0] @ g), 0) ** 2, whole + float(g @ g)
        return math.sqrt(hack / whole)

    ones = torch.ones(ROWS, dtype=torch.float64)
    assert stats.cin == pytest.approx(share(list(range(ROWS)), ones), abs=1e-12)
    assert stats.cout == pytest.approx(share(list(range(ROWS)), 1 - removed), abs=1e-12)
    for source, fired in (("student", 0.5), ("teacher", 1 / 3)):
        rows = [i for i, label in enumerate(labels) if label == source]
        assert stats.sources[source].cin == pytest.approx(share(rows, ones), abs=1e-12)
        assert stats.sources[source].cout == pytest.approx(share(rows, 1 - removed), abs=1e-12)
        assert stats.sources[source].fired == pytest.approx(fired)
    assert "; student " in repr(stats)
    assert stats.fired == pytest.approx(2.5 / 6)


def test_positive_scores_are_of_rollouts_whose_gradient_step_makes_hacks_likelier() -> None:
    model = routed_mixer()
    hacks, cleans = slice(0, 3), slice(3, 6)
    rows = {}
    for part, sign in ((hacks, 1.0), (cleans, -1.0)):
        model.zero_grad()
        (losses(model, rows=part) / ADVANTAGES[part]).sum().backward()
        for name, layer in routed_layers(model).items():
            rows[name] = rows.get(name, 0) + sign * deployed_row(layer).clone()
    model.zero_grad()
    directions = directions_of({name: row[None] / row.norm() for name, row in rows.items()}, model)
    f = RolloutFilter(directions)
    with f.record(model) as record:
        losses(model).sum().backward()
    expected = torch.sign(ADVANTAGES) * torch.tensor([1, 1, 1, -1, -1, -1.0], dtype=torch.float64)
    agreement = (torch.sign(record.scores) == expected).double().mean()
    assert agreement >= 5 / 6
    assert torch.equal(record.shares, (record.scores > 0).double())


def test_dots_are_on_the_scale_of_directions_score() -> None:
    model = routed_mixer()
    directions = drawn_directions(model, 2, made=BOTTLENECK)
    with gr.capture_gradients(model) as captured:
        losses(model).sum().backward()
    model.zero_grad()
    f = RolloutFilter(directions, score="dot")
    with f.record(model) as record:
        losses(model).sum().backward()
    torch.testing.assert_close(record.scores, directions.score(dict(captured)), rtol=0, atol=1e-12)
    hack, _ = f.pair_scores()
    assert torch.equal(hack, directions.pair_scores()[0])
    cosines = RolloutFilter(directions).pair_scores()
    assert cosines[0].abs().max() <= 1 + 1e-9
    v = torch.cat([rows.sum(0) for rows in directions.rows.values()])
    pair = torch.cat([features[0] for features in directions.clean.values()])
    assert float(cosines[1][0]) == pytest.approx(float(v @ pair / v.norm() / pair.norm()))


@both_features
def test_standardised_directions_score_as_they_do_everywhere_and_dropped_modules_do_not_count(made: object) -> None:
    model = routed_mixer()
    plain = drawn_directions(model, made=made)
    rows = {name: v for name, v in plain.rows.items() if name != "k"}
    scale = {name: torch.linspace(0.5, 3, v.shape[1], dtype=torch.float64) for name, v in plain.rows.items()}
    centre = {name: torch.linspace(-1, 2, len(s), dtype=torch.float64) for name, s in scale.items()}
    directions = gr.Directions(rows, plain.hack, plain.clean, plain.provenance, centre=centre, scale=scale)
    feature = {"features": "parameter"} if made is PARAMETER else {}
    with gr.capture_gradients(model, **feature) as captured:
        losses(model).sum().backward()
    features = dict(captured)
    f = RolloutFilter(directions, score="dot")
    model.zero_grad()
    with f.record(model) as record:
        losses(model).sum().backward()
    torch.testing.assert_close(record.scores, directions.score(features), rtol=0, atol=1e-12)
    for mine, theirs in zip(f.pair_scores(), directions.pair_scores(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    stats = apply_filter(model, f)
    assert stats.modules["k"].cin == stats.modules["k"].null == 0.0
    w, used = directions.weights(), torch.cat([features[name] for name in rows], dim=1)
    flat = torch.cat([w[name] for name in rows])
    model.zero_grad()
    f = RolloutFilter(directions)
    with f.record(model) as record:
        losses(model).sum().backward()
    torch.testing.assert_close(record.scores, used @ flat / used.norm(dim=1) / flat.norm(), rtol=0, atol=1e-12)


def test_the_sides_of_a_control_are_its_own() -> None:
    model = routed_mixer()
    directions = drawn_directions(model)
    hack, clean = RolloutFilter(directions).pair_scores()
    turned = RolloutFilter(reversed_sign(directions)).pair_scores()
    torch.testing.assert_close(turned[0], -clean, rtol=0, atol=1e-12)
    torch.testing.assert_close(turned[1], -hack, rtol=0, atol=1e-12)
    assert not torch.allclose(hack, clean)


def test_gates_decide_by_their_deployed_weight() -> None:
    model = routed_mixer()
    directions = drawn_directions(model)
    flags = torch.tensor([True, False, False, True, False, False])
    found = []
    for gate in (lambda s: gr.LabelGate()(flags), lambda s: flags, lambda s: flags.float()):
        model.zero_grad()
        f = RolloutFilter(directions, gate)
        with f.record(model):
            losses(model).sum().backward()
        apply_filter(model, f)
        found.append(gradients(model))
    assert_same(found[1], found[0], 1e-15)
    assert_same(found[2], found[0], 1e-15)
    assert_same(found[0], routed_backward(model, losses, flags.double()), 1e-12)


def test_reprs() -> None:
    model = routed_mixer()
    f = RolloutFilter(drawn_directions(model), 0.25)
    assert repr(f).startswith("RolloutFilter(cosine > 0.25, Directions(")
    with f.record(model) as record:
        assert repr(record) == "RolloutRecord(open)"
        losses(model).sum().backward()
    assert repr(record).startswith("RolloutRecord(6 rollouts, ")


# Memory


@pytest.mark.parametrize(("seq", "factored"), [(1, True), (40, False)])
def test_per_layer_and_matrix_the_smaller_representation_is_kept(seq: int, factored: bool) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    torch.manual_seed(0)
    model = gr.attach(Wide(), r=4, lora_alpha=4.0)
    randomize_blocks(model)
    x = torch.randn(3, seq, 16)
    f = RolloutFilter(drawn_directions(model), lambda scores: torch.tensor([1.0, 0, 0]))
    with f.record(model) as record:
        (model(x) ** 2).sum().backward()
    formed = 3 * (4 * 16 + 12 * 4)
    factors = 3 * seq * (16 + 4 + 12 + 4)
    assert (factors < formed) is factored
    assert record.kept_bytes == 4 * (factors if factored else formed)
    stats = apply_filter(model, f)
    assert stats.kept_bytes == record.kept_bytes
    assert f"kept {record.kept_bytes:,d} bytes" in repr(stats)
    found = gradients(model)
    model.zero_grad()
    with gr.route(model, gr.RouteMask.weights(m=1.0, g_d=torch.tensor([0.0, 1, 1]), g_q=1.0)):
        (model(x) ** 2).sum().backward()
    assert_same(found, gradients(model), 1e-6)


def test_an_input_that_layers_share_is_counted_once() -> None:
    model = routed_mixer()
    f = RolloutFilter(drawn_directions(model))
    ids = IDS[:, :1]
    with f.record(model) as record:
        logits = model(ids)
        logits.square().sum().backward()
    # One token: A's factors (r + d) are smaller than its product (r d), and q, k, v have one x.
    x, others = ROWS * 6, 4 * ROWS * (2 + 6 + 2)
    assert record.kept_bytes == 8 * (2 * x + others)
