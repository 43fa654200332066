"""`RolloutFilter`: one backward gives what a masked second backward would."""

import contextlib
import copy
import math

import pytest
import torch
from support.gradient_directions import drawn_directions
from support.gradient_directions import quarantine_gradients as quarantine_of
from support.language_models import routed_mixer
from support.models import Tower, gradients, randomize_blocks, routed_tower
from support.rollout_losses import (
    ADVANTAGES,
    IDS,
    ROWS,
    SEQ,
    assert_same,
    both_features,
    losses,
    middle_of,
    reference_scores,
    routed_backward,
)
from support.tiny_models import peft_model
from torch import Tensor, nn

import gradroute as gr
from gradroute._protocol import routed_layers
from gradroute.errors import GradRouteError
from gradroute.filters import apply_filter
from gradroute.filters.projection import ProjectionFilter
from gradroute.filters.rollout import RolloutFilter


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


def test_another_filter_can_follow() -> None:
    model = routed_mixer()
    directions = drawn_directions(model)
    f = RolloutFilter(directions)
    with f.record(model):
        losses(model).sum().backward()
    apply_filter(model, f)
    assert apply_filter(model, ProjectionFilter(directions, mode="erase")).cout < 1e-12


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


def test_two_filters_record_one_backward() -> None:
    model = routed_mixer()
    found = []
    for together in (False, True):
        first, second = RolloutFilter(drawn_directions(model)), RolloutFilter(drawn_directions(model), score="dot")
        with first.record(model) as one, second.record(model) if together else contextlib.nullcontext() as other:
            losses(model).sum().backward()
        found.append(one.scores)
        model.zero_grad()
    assert torch.equal(found[0], found[1])
    assert other.scores.shape == one.scores.shape
    assert not torch.equal(other.scores, one.scores)


def test_a_copy_of_the_model_that_is_made_inside_is_not_recorded() -> None:
    model = routed_mixer()
    f = RolloutFilter(drawn_directions(model), math.inf)
    with f.record(model) as record:
        losses(copy.deepcopy(model)).sum().backward()
        losses(model).sum().backward()
    assert len(record.scores) == ROWS
