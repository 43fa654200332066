"""What would go unnoticed in a `RolloutFilter`: each is refused, or leaves nothing behind."""

import math

import pytest
import torch
from support.gradient_directions import ACTIVATION, BOTTLENECK, directions_of, drawn_directions
from support.language_models import routed_mixer
from support.models import gradients
from support.rollout_losses import IDS, ROWS, assert_same, losses, routed_backward

import gradroute as gr
from gradroute.errors import GradRouteError
from gradroute.filters import apply_filter
from gradroute.filters.rollout import RolloutFilter


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
            with RolloutFilter(directions_of(bad, model)).record(model):
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
    with pytest.raises(GradRouteError, match="should be the sum of the recorded rollouts"):
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
