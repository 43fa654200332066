"""`RolloutFilter`: one backward gives what a masked second backward would, and nothing goes unnoticed."""

import contextlib
import math

import pytest
import torch
from gradient_directions import ACTIVATION, BOTTLENECK, PARAMETER, deployed_row, directions_of, drawn_directions
from gradient_directions import quarantine_gradients as quarantine_of
from language_models import VOCAB, routed_mixer
from models import Tower, gradients, randomize_blocks, routed_tower
from tiny_models import peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gradroute as gr
from gradroute.errors import GradRouteError
from gradroute.protocol import routed_layers
from gradroute.routing.apply_filter import apply_filter
from gradroute.routing.filters import ProjectionFilter
from gradroute.routing.rollout_filter import RolloutFilter

ROWS, SEQ = 6, 7
IDS = torch.randint(VOCAB, (ROWS, SEQ), generator=torch.Generator().manual_seed(0))
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0, -1.5, 0.3, -1.0], dtype=torch.float64)


def losses(model: nn.Module, ids: Tensor = IDS, rows: slice = slice(None)) -> Tensor:
    """A policy-gradient loss per rollout: advantage times NLL."""
    ids = ids[rows]
    logits = model(ids)
    logits = getattr(logits, "logits", logits)
    nll = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return ADVANTAGES.to(nll.dtype)[rows] * nll.view(len(ids), -1).mean(1)


def tower_losses(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[rows]
    return ADVANTAGES[rows].to(x) * model(x.to(next(model.parameters()).dtype)).square().sum(1)


def gain_tower() -> Tower:
    torch.manual_seed(0)
    model = Tower().double()
    gr.attach(model, r=3, r_quarantine=2, lora_alpha=4.0, parametrization="svd_gain", rotate=True)
    return randomize_blocks(model)


def llama() -> nn.Module:
    return peft_model("llama", torch.float64)


CASES = {
    "mixer": (routed_mixer, losses),
    "tower": (routed_tower, tower_losses),
    "gain": (gain_tower, tower_losses),
    "peft": (llama, losses),
}
cases = pytest.mark.parametrize("case", CASES)
both_features = pytest.mark.parametrize("made", [PARAMETER, BOTTLENECK], ids=["parameter", "bottleneck"])


def own_gradients(model: nn.Module, loss_fn) -> list[dict[str, Tensor]]:
    """Each rollout's own deployed gradient, by a backward of its own."""
    rows = []
    for i in range(ROWS):
        model.zero_grad()
        loss_fn(model)[i].backward()
        rows.append({name: deployed_row(layer).clone() for name, layer in routed_layers(model).items()})
    model.zero_grad()
    return rows


def reference_scores(model: nn.Module, loss_fn, directions: gr.Directions) -> Tensor:
    """Cosine of each rollout's gradient, or bottleneck feature, with the summed rows, over all modules."""
    v = torch.cat([rows.sum(0) for rows in directions.rows.values()])
    if directions.provenance.feature == "bottleneck":
        with gr.capture_gradients(model) as captured:
            loss_fn(model).sum().backward()
        model.zero_grad()
        features = torch.cat(list(captured.values()), dim=1)
    else:
        features = torch.stack([torch.cat(list(rows.values())) for rows in own_gradients(model, loss_fn)])
    return features @ v / features.norm(dim=1) / v.norm()


def middle_of(scores: Tensor) -> float:
    """Between the third and the fourth of six."""
    return float(scores.sort().values[2:4].mean())


def routed_backward(model: nn.Module, loss_fn, removed: Tensor) -> dict[str, Tensor]:
    """The second pass of the two-pass computation: a masked backward."""
    model.zero_grad()
    with gr.route(model, gr.RouteMask.weights(m=1.0, g_d=1 - removed, g_q=1.0)):
        loss_fn(model).sum().backward()
    found = gradients(model)
    model.zero_grad()
    return found


@contextlib.contextmanager
def counted_backwards(model: nn.Module):
    """How often any layer's output got a gradient."""
    counts: dict[str, int] = {}
    handles = []
    for name, layer in routed_layers(model).items():

        def hook(module, args, output, name=name):
            if torch._C._current_graph_task_id() == -1:
                output.register_hook(lambda _: counts.__setitem__(name, counts.get(name, 0) + 1))

        handles.append(layer.register_forward_hook(hook))
    yield counts
    for handle in handles:
        handle.remove()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-30)
        assert error < tolerance, (name, float(error))


# The two-pass computation, in one


@cases
@both_features
def test_one_backward_equals_scoring_and_a_masked_second_backward(case: str, made: object) -> None:
    build, loss_fn = CASES[case]
    model = build()
    directions = drawn_directions(model, 2, made=made)
    scores = reference_scores(model, loss_fn, directions)
    threshold = middle_of(scores)
    flagged = scores > threshold
    expected = routed_backward(model, loss_fn, flagged.double())
    with counted_backwards(model) as counts:
        f = RolloutFilter(directions, threshold)
        with f.record(model) as record:
            loss_fn(model).sum().backward()
        unfiltered = gradients(model)
        stats = apply_filter(model, f)
    assert set(counts.values()) == {1}
    torch.testing.assert_close(record.scores, scores, rtol=0, atol=1e-12)
    assert torch.equal(record.shares, flagged.double())
    assert 0 < flagged.sum() < ROWS
    assert_same(gradients(model), expected, 1e-12)
    for name, _ in gr.quarantine_parameters(model):
        assert torch.equal(gradients(model)[name], unfiltered[name])
    for name, _ in gr.deployed_parameters(model):
        assert (unfiltered[name] - expected[name]).norm() > 1e-3 * expected[name].norm()
    assert stats.fired == pytest.approx(float(flagged.double().mean()))
    assert stats.residual < 1e-13


@both_features
def test_in_float32_it_agrees_to_rounding(made: object) -> None:
    model = routed_mixer(torch.float32)
    directions = drawn_directions(model, 2, made=made)
    scores = reference_scores(model, losses, directions)
    threshold = middle_of(scores)
    expected = routed_backward(model, losses, (scores > threshold).float())
    f = RolloutFilter(directions, threshold)
    with f.record(model):
        losses(model).sum().backward()
    apply_filter(model, f)
    assert_same(gradients(model), expected, 1e-6)


@cases
def test_soft_shares_weigh_the_rollouts(case: str) -> None:
    build, loss_fn = CASES[case]
    model = build()
    removed = torch.tensor([0.0, 0.25, 1.0, 0.5, 0.9, 0.1], dtype=torch.float64)
    expected = routed_backward(model, loss_fn, removed)
    f = RolloutFilter(drawn_directions(model), lambda scores: removed)
    with f.record(model):
        loss_fn(model).sum().backward()
    apply_filter(model, f)
    assert_same(gradients(model), expected, 1e-12)


@cases
def test_with_every_rollout_flagged_the_deployed_gradient_is_exactly_zero(case: str) -> None:
    build, loss_fn = CASES[case]
    model = build()
    f = RolloutFilter(drawn_directions(model), -math.inf)
    with f.record(model):
        loss_fn(model).sum().backward()
    assert all(p.grad.any() for _, p in gr.deployed_parameters(model))
    quarantine = quarantine_of(model)
    stats = apply_filter(model, f)
    assert not any(p.grad.any() for _, p in gr.deployed_parameters(model))
    assert all(torch.equal(a, b) for a, b in zip(quarantine, quarantine_of(model), strict=True))
    assert all(q.any() for q in quarantine)
    assert (stats.fired, stats.cout) == (1.0, 0.0)


def test_with_none_flagged_the_gradient_is_that_of_the_backward() -> None:
    model = routed_mixer()
    f = RolloutFilter(drawn_directions(model), math.inf)
    with f.record(model):
        losses(model).sum().backward()
    before = gradients(model)
    stats = apply_filter(model, f)
    assert_same(gradients(model), before, 1e-13)
    assert stats.cin == stats.cout > 0
    assert stats.fired == 0.0


@both_features
@pytest.mark.parametrize("one_block", [True, False])
def test_micro_batches_add_up(made: object, one_block: bool) -> None:
    model = routed_mixer()
    directions = drawn_directions(model, 2, made=made)
    scores = reference_scores(model, losses, directions)
    threshold = middle_of(scores)
    expected = routed_backward(model, losses, (scores > threshold).double())
    f = RolloutFilter(directions, threshold)
    halves = [slice(0, 2), slice(2, ROWS)]
    if one_block:
        with f.record(model) as record:
            parts = [losses(model, rows=rows).sum() for rows in halves]
            sum(parts).backward()
        torch.testing.assert_close(record.scores, scores, rtol=0, atol=1e-12)
    else:
        for rows in halves:
            with f.record(model) as record:
                losses(model, rows=rows).sum().backward()
            torch.testing.assert_close(record.scores, scores[rows], rtol=0, atol=1e-12)
    stats = apply_filter(model, f)
    assert_same(gradients(model), expected, 1e-12)
    assert stats.fired == pytest.approx(0.5)


@both_features
def test_a_route_in_force_is_part_of_each_rollouts_contribution(made: object) -> None:
    model = routed_mixer()
    directions = drawn_directions(model, 2, made=made)
    g_d = torch.tensor([1.0, 0.0, 0.5, -0.7, 1.0, 2.0], dtype=torch.float64)
    m = torch.tensor([1.0, 1.0, 0.0, 0.3, 1.0, 1.0], dtype=torch.float64)

    def masked(model: nn.Module) -> Tensor:
        return losses(model)

    removed = torch.tensor([1.0, 0, 0, 1.0, 0, 0.5], dtype=torch.float64)
    with gr.route(model, gr.RouteMask.weights(m=m, g_d=g_d * (1 - removed), g_q=1.0)):
        masked(model).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    f = RolloutFilter(directions, lambda scores: removed)
    with gr.route(model, gr.RouteMask.weights(m=m, g_d=g_d, g_q=1.0)), f.record(model) as record:
        masked(model).sum().backward()
    apply_filter(model, f)
    assert_same(gradients(model), expected, 1e-12)
    # A rollout that the route keeps out of the deployed block has no gradient to score; a negative weight turns it.
    assert record.scores[1] == 0
    with gr.route(model, gr.RouteMask.weights(m=m, g_d=1.0, g_q=1.0)), f.record(model) as plain:
        masked(model).sum().backward()
    torch.testing.assert_close(record.scores[[0, 2, 4, 5]], plain.scores[[0, 2, 4, 5]], rtol=0, atol=1e-12)
    torch.testing.assert_close(record.scores[3], -plain.scores[3], rtol=0, atol=1e-12)


def test_masks_per_token_are_followed() -> None:
    model = routed_mixer()
    tokens = torch.rand(ROWS, SEQ, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    removed = torch.tensor([1.0, 0, 0, 1.0, 0, 0.5], dtype=torch.float64)
    with gr.route(model, gr.RouteMask.weights(m=1.0, g_d=tokens * (1 - removed)[:, None], g_q=1.0)):
        losses(model).sum().backward()
    expected = gradients(model)
    model.zero_grad()
    f = RolloutFilter(drawn_directions(model), lambda scores: removed)
    with gr.route(model, gr.RouteMask.weights(m=1.0, g_d=tokens, g_q=1.0)), f.record(model):
        losses(model).sum().backward()
    apply_filter(model, f)
    assert_same(gradients(model), expected, 1e-12)


def test_peft_dropout_is_followed() -> None:
    model = peft_model("llama", torch.float64, lora_dropout=0.4).train()
    removed = torch.tensor([1.0, 0, 0, 1.0, 0, 0.5], dtype=torch.float64)
    torch.manual_seed(5)
    expected = routed_backward(model, losses, removed)
    f = RolloutFilter(drawn_directions(model), lambda scores: removed)
    torch.manual_seed(5)
    with f.record(model):
        losses(model).sum().backward()
    apply_filter(model, f)
    assert_same(gradients(model), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_low_precision_agree_to_their_rounding(dtype: torch.dtype) -> None:
    model = routed_mixer(dtype)
    removed = torch.tensor([1.0, 0, 0, 1.0, 0, 0.5])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32)
    with autocast:
        expected = routed_backward(model, losses, removed)
        f = RolloutFilter(drawn_directions(model), lambda scores: removed)
        with f.record(model):
            losses(model).sum().backward()
    stats = apply_filter(model, f)
    assert_same(gradients(model), expected, 0.02)
    assert stats.residual < 0.02


# Checkpointing


def test_non_reentrant_checkpointing_is_exact() -> None:
    model = routed_mixer()
    directions = drawn_directions(model)
    scores = reference_scores(model, losses, directions)
    threshold = middle_of(scores)
    expected = routed_backward(model, losses, (scores > threshold).double())
    model.reentrant = False
    f = RolloutFilter(directions, threshold)
    with f.record(model) as record:
        first, second = losses(model, rows=slice(0, 3)).sum(), losses(model, rows=slice(3, ROWS)).sum()
        (second + first).backward()
    apply_filter(model, f)
    torch.testing.assert_close(record.scores, scores, rtol=0, atol=1e-12)
    assert_same(gradients(model), expected, 1e-12)


def test_reentrant_checkpointing_is_refused() -> None:
    model = routed_mixer()
    model.reentrant = True
    f = RolloutFilter(drawn_directions(model))
    with pytest.raises(GradRouteError, match="use_reentrant=False"):
        with f.record(model):
            hidden = model.embed(IDS).requires_grad_()
            torch.utils.checkpoint.checkpoint(model.body, hidden, use_reentrant=True).sum().backward()


def test_forwards_without_a_graph_and_of_the_base_model_are_left_out() -> None:
    model = routed_mixer()
    removed = torch.tensor([1.0, 0, 0, 1.0, 0, 0.5], dtype=torch.float64)
    expected = routed_backward(model, losses, removed)
    f = RolloutFilter(drawn_directions(model), lambda scores: removed)
    with f.record(model) as record:
        with torch.no_grad():
            losses(model)
        with gr.disable_adapters(model):
            reference = losses(model).detach()
        (losses(model) + 0 * reference).sum().backward()
    assert len(record.scores) == ROWS
    apply_filter(model, f)
    assert_same(gradients(model), expected, 1e-12)


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
    directions = directions_of({name: row[None] / row.norm() for name, row in rows.items()})
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
    turned = RolloutFilter(directions.reversed()).pair_scores()
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


# What would go unnoticed


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (lambda s: gr.RouteMask.exclusive(s > 0), 'below="absorb"'),
        (lambda s: gr.RouteMask.weights(m=1.0, g_d=s * 0 + 0.5, g_q=0.5), "m = g_q = 1"),
        (lambda s: gr.RouteMask.classic(s[:3] > 0), "mask of 6 rows"),
        (lambda s: torch.ones(5), r"shape \(6,\). Found \(5,\)"),
        (lambda s: [True] * 6, r"Found list"),
        (lambda s: s * 0 + 1.5, r"in \[0, 1\]"),
        (lambda s: s * 0 - 0.1, r"in \[0, 1\]"),
        (lambda s: s * math.nan, r"in \[0, 1\]"),
    ],
)
def test_gates_that_ask_for_something_else_are_refused(gate, message: str) -> None:
    model = routed_mixer()
    f = RolloutFilter(drawn_directions(model), gate)
    with pytest.raises(GradRouteError, match=message):
        with f.record(model):
            losses(model).sum().backward()


def test_directions_that_cannot_score_a_gradient_are_refused() -> None:
    model = routed_mixer()
    with pytest.raises(GradRouteError, match="extract_gradient_directions"):
        RolloutFilter(drawn_directions(model, made=ACTIVATION))
    with pytest.raises(GradRouteError, match="`gate` should be a number"):
        RolloutFilter(drawn_directions(model), math.nan)
    rows = dict(drawn_directions(model).rows)
    for bad, message in (
        ({**rows, "q": rows["q"][:, 1:]}, "24 wide. Found 23"),
        ({**rows, "q": torch.cat([rows["q"], -rows["q"]])}, "add up to nothing"),
        ({name: row for name, row in rows.items() if name != "k"}, r"Without a direction: \['k'\]"),
    ):
        with pytest.raises(GradRouteError, match=message):
            with RolloutFilter(directions_of(bad)).record(model):
                raise AssertionError("the block should not be entered")


def test_bottleneck_gradients_that_vanish_because_B_is_zero_raise() -> None:
    model = routed_mixer()
    model.k.lora_B.data.zero_()
    f = RolloutFilter(drawn_directions(model, 2, made=BOTTLENECK))
    with pytest.raises(GradRouteError, match="bottleneck gradients of `k` all vanish"):
        with f.record(model):
            losses(model).sum().backward()
    model.zero_grad()
    f = RolloutFilter(drawn_directions(model))
    with f.record(model):
        losses(model).sum().backward()
    apply_filter(model, f)


def test_applying_without_a_record_and_twice_raises() -> None:
    model = routed_mixer()
    f = RolloutFilter(drawn_directions(model))
    losses(model).sum().backward()
    with pytest.raises(GradRouteError, match="No rollout was recorded"):
        apply_filter(model, f)
    model.zero_grad()
    with f.record(model) as record:
        with pytest.raises(GradRouteError, match="is known when the block"):
            record.scores  # noqa: B018
        with pytest.raises(GradRouteError, match="inside its own `record`"):
            losses(model).sum().backward()
            apply_filter(model, f)
        with pytest.raises(GradRouteError, match="`record` inside `record`"):
            with f.record(model):
                pass
    apply_filter(model, f)
    with pytest.raises(GradRouteError, match="already"):
        apply_filter(model, f)
    model.zero_grad()
    losses(model).sum().backward()
    with pytest.raises(GradRouteError, match="No rollout was recorded"):
        apply_filter(model, f)


def test_a_missing_backward_and_a_second_one_raise() -> None:
    model = routed_mixer()
    f = RolloutFilter(drawn_directions(model))
    with pytest.raises(GradRouteError, match="run forward and backward"):
        with f.record(model):
            losses(model)
    with pytest.raises(GradRouteError, match="second backward through one forward"):
        with f.record(model):
            loss = losses(model).sum()
            loss.backward(retain_graph=True)
            loss.backward()
    model.zero_grad()
    with pytest.raises(GradRouteError, match="run forward and backward"):
        with f.record(model):
            pass


def test_rollouts_that_were_not_recorded_are_found() -> None:
    model = routed_mixer()
    f = RolloutFilter(drawn_directions(model))
    losses(model, rows=slice(0, 2)).sum().backward()
    with f.record(model):
        losses(model, rows=slice(2, ROWS)).sum().backward()
    before = gradients(model)
    with pytest.raises(GradRouteError, match="should be the sum of the rollouts that were recorded"):
        apply_filter(model, f)
    assert_same(gradients(model), before, 1e-30)


def test_a_gradient_changed_after_its_record_is_found() -> None:
    model = routed_mixer()
    f = RolloutFilter(drawn_directions(model))
    with f.record(model):
        losses(model).sum().backward()
    torch.nn.utils.clip_grad_norm_([p for _, p in gr.deployed_parameters(model)], 1e9)
    with pytest.raises(GradRouteError, match="written to since its rollouts were recorded"):
        apply_filter(model, f)


def test_rollouts_of_a_step_that_was_skipped_are_forgotten() -> None:
    for set_to_none in (True, False):
        model = routed_mixer()
        removed = torch.tensor([1.0, 0, 0, 1.0, 0, 0.5], dtype=torch.float64)
        expected = routed_backward(model, losses, removed)
        f = RolloutFilter(drawn_directions(model), lambda scores, removed=removed: removed)
        for _ in range(2):
            model.zero_grad(set_to_none=set_to_none)
            with f.record(model):
                losses(model).sum().backward()
        stats = apply_filter(model, f)
        assert_same(gradients(model), expected, 1e-12)
        assert stats.fired == pytest.approx(2.5 / 6)


def test_an_error_inside_the_block_leaves_no_hooks_and_no_rollouts() -> None:
    model = routed_mixer()
    removed = torch.tensor([1.0, 0, 0, 1.0, 0, 0.5], dtype=torch.float64)
    expected = routed_backward(model, losses, removed)
    f = RolloutFilter(drawn_directions(model), lambda scores: removed)
    with pytest.raises(RuntimeError, match="out of memory"):
        with f.record(model):
            losses(model).sum().backward()
            raise RuntimeError("out of memory")
    assert not any(module._forward_hooks for module in model.modules())
    model.zero_grad()
    with f.record(model):
        losses(model).sum().backward()
    apply_filter(model, f)
    assert_same(gradients(model), expected, 1e-12)


def test_layers_that_run_more_often_than_others_are_refused() -> None:
    model = routed_mixer()
    f = RolloutFilter(drawn_directions(model))
    with pytest.raises(GradRouteError, match="same rollouts as often"):
        with f.record(model):
            (losses(model).sum() + model.q(model.embed(IDS)).sum()).backward()
    model.zero_grad()
    with pytest.raises(GradRouteError, match="same axes"):
        with f.record(model):
            x = model.embed(IDS)
            flat = model.q(x.flatten(0, 1)[:ROWS]).sum() + model.k(x).sum() + model.v(x).sum() + model.out(x).sum()
            flat.backward()


def test_sources_are_labels_of_all_rollouts_of_all_micro_batches() -> None:
    model = routed_mixer()
    f = RolloutFilter(drawn_directions(model))
    with pytest.raises(GradRouteError, match="should label 6 rollouts. Found 2"):
        with f.record(model, sources=["student", "teacher"]):
            losses(model).sum().backward()
    model.zero_grad()
    with f.record(model, sources=["student"] * ROWS):
        losses(model).sum().backward()
    with pytest.raises(GradRouteError, match="all with or all without `sources`"):
        with f.record(model):
            losses(model).sum().backward()


def test_a_rollout_whose_gradient_is_not_finite_raises() -> None:
    model = routed_mixer()
    f = RolloutFilter(drawn_directions(model))
    with pytest.raises(GradRouteError, match="rollout 2 is not finite"):
        with f.record(model):
            weights = torch.ones(ROWS, dtype=torch.float64)
            weights[2] = math.inf
            (losses(model) * weights).sum().backward()


def test_another_filter_can_follow() -> None:
    model = routed_mixer()
    directions = drawn_directions(model)
    f = RolloutFilter(directions)
    with f.record(model):
        losses(model).sum().backward()
    apply_filter(model, f)
    assert apply_filter(model, ProjectionFilter(directions, mode="erase")).cout < 1e-12


def test_reprs() -> None:
    model = routed_mixer()
    f = RolloutFilter(drawn_directions(model), 0.25)
    assert repr(f).startswith("RolloutFilter(cosine > 0.25, Directions(")
    with f.record(model) as record:
        assert repr(record) == "RolloutRecord(open)"
        losses(model).sum().backward()
    assert repr(record).startswith("RolloutRecord(6 rollouts, ")
