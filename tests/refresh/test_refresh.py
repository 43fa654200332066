"""`Refresher`: it changes what it should, reports it, and puts everything else back."""

import dataclasses
import json
import math
import random

import pytest
import torch
from support.language_models import MODULES, Mixer, routed_mixer
from support.refreshing import ablated, activations, bottleneck_gradients, control, move, refresher

import gradroute as gr

pytestmark = pytest.mark.touches_peft

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


# What a refresh does


def test_the_same_object_is_updated_so_that_a_gate_sees_it() -> None:
    model = routed_mixer()
    made = refresher(model)
    directions = made.directions
    gate = gr.BandGate(directions)
    before = gate.ends
    move(model)
    made.refresh()
    fresh = ablated(model)
    assert made.directions is directions
    assert all(torch.equal(directions.rows[name], fresh.rows[name]) for name in MODULES)
    assert gate.ends != before
    assert gate.ends == gr.BandGate(fresh).ends


def test_the_report_says_step_age_overlap_and_version() -> None:
    model = routed_mixer()
    made = refresher(model, every=3)
    old = ablated(model)
    for _ in range(2):
        move(model)
        assert made.step() is None
    assert made.age == 2
    move(model, by=0.5)
    report = made.step()
    assert (report.step, report.age, report.moved, report.version) == (3, 3, True, 1)
    assert report.overlap == pytest.approx(ablated(model).overlap(old), abs=1e-12)
    assert -1 < report.overlap < 0.999
    assert made.age == 0
    assert made.directions.step == 3
    angle = max(max(angles) for angles in report.angles.values())
    assert repr(report) == (
        f"RefreshReport(step 3, age 3, overlap {report.overlap:.3f}, angles up to {angle:.1f} degrees, version 1)"
    )
    assert "every 3 steps, 1 done, age 0, next in 3" in repr(made)


def test_a_refresh_off_schedule_counts_as_the_last_extraction() -> None:
    model = routed_mixer()
    made = refresher(model, every=5)
    for _ in range(3):
        made.step()
    move(model)
    assert made.refresh().age == 3
    move(model)
    assert [made.step() is None for _ in range(5)] == [True, True, True, True, False]
    assert made.reports[-1].age == 5


def test_the_overlap_of_a_random_control_with_itself_is_one() -> None:
    model = routed_mixer()
    made = gr.Refresher(control(model), lambda: activations(model), model=model)
    move(model)
    assert made.refresh().overlap == pytest.approx(1.0)


def test_deployed_parameters_that_did_not_move_are_no_error_and_are_reported() -> None:
    model = routed_mixer()
    made = refresher(model, every=1)
    with torch.no_grad():
        for _, parameter in gr.quarantine_parameters(model):
            parameter.add_(0.1)
    report = made.step()
    assert not report.moved
    assert report.overlap == pytest.approx(1.0)
    assert "deployed blocks unmoved" in repr(report)
    move(model)
    assert made.step().moved
    assert not made.step().moved


@pytest.mark.corner("a step exchanges two weights, so that every sum stays", "counts as moved parameters")
def test_a_swap_of_two_weights_is_a_move() -> None:
    model = routed_mixer()
    stale = ablated(model)
    made = refresher(model, lambda: stale)
    with torch.no_grad():
        for _, parameter in gr.deployed_parameters(model):
            parameter.copy_(parameter.flip(0))
    with pytest.raises(gr.errors.RefreshError, match="bitwise the same"):
        made.refresh()


def test_directions_taken_before_training_in_the_on_view_can_be_refreshed() -> None:
    model = routed_mixer()
    made = gr.Refresher(activations(model), lambda: activations(model), model=model)
    assert made.directions.provenance.view == "on"
    move(model)
    made.refresh()
    assert made.directions.provenance.view == "ablated"


def test_a_refresh_that_renews_the_clean_side_alone_is_no_no_op() -> None:
    model = routed_mixer()
    old = ablated(model)
    fresh = dataclasses.replace(old, clean={name: rows + 1 for name, rows in old.clean.items()})
    made = gr.Refresher(old, lambda: fresh, model=model, every=1)
    move(model)
    assert made.step().moved
    assert all(torch.equal(made.directions.clean[name], fresh.clean[name]) for name in fresh.clean)


# Principal angles


def test_the_report_has_an_angle_per_row_and_module_of_the_same_turn_as_the_overlap() -> None:
    model = routed_mixer()
    made = refresher(model)
    old = ablated(model)
    move(model, by=0.5)
    report = made.refresh()
    assert list(report.angles) == MODULES
    for name, (angle,) in report.angles.items():
        cosine = float(made.directions.rows[name] @ old.rows[name].T)
        assert abs(cosine) == pytest.approx(math.cos(math.radians(angle)), abs=1e-9)
    assert json.loads(json.dumps(dataclasses.asdict(report)))["angles"] == report.angles


# What extraction sees, and what is put back


def ablated_gradients(model: Mixer) -> gr.Directions:
    return ablated(model, bottleneck_gradients)


def fails(model: Mixer) -> gr.Directions:
    activations(model)
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("extract", [activations, bottleneck_gradients, fails])
def test_extraction_sees_the_ablated_model_and_everything_is_put_back(extract) -> None:
    model, seen = routed_mixer(dropout=0.5).train(), []
    model.v.eval()
    directions = ablated_gradients(model) if extract is bottleneck_gradients else ablated(model)

    def watched() -> gr.Directions:
        torch.rand(2)
        random.random()
        seen.append({(layer.view, layer.training, layer.has_open_route) for layer in (model.q, model.v, model.out)})
        return extract(model)

    made = gr.Refresher(directions, watched, model=model, every=1)
    model(IDS).sum().backward()
    move(model)
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    assert sum(grad is not None for grad, _ in grads.values()) == 16
    values = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    rng, python_rng = torch.get_rng_state(), random.getstate()
    with gr.ablate_quarantine(model, 0.5), gr.route(model, gr.RouteMask.classic([True, False])):
        if extract is fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                made.step()
        else:
            made.step()
        assert torch.equal(torch.get_rng_state(), rng)
        assert random.getstate() == python_rng
        assert {(layer.view, layer.has_open_route) for layer in (model.q, model.v, model.out)} == {("scaled 0.5", True)}
        model(IDS)
    assert seen == [{("ablated", False, False)}]
    assert model.q.view == "on"
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == trainable
    for name, parameter in model.named_parameters():
        grad, before = grads[name]
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, before)
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert made.directions.version == (0 if extract is fails else 1)


def test_a_failed_refresh_leaves_the_directions_and_can_be_repeated() -> None:
    model, failing = routed_mixer(), [True]
    made = refresher(model, lambda: (fails if failing.pop() else activations)(model), every=1)
    failing.insert(0, False)
    move(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        made.step()
    assert (made.directions.version, made.age, made.reports) == (0, 1, [])
    assert made.refresh().age == 1


def test_angles_of_every_module_are_kept_for_the_latest_refresh_only() -> None:
    """They would grow in every checkpoint: some hundred modules, refresh after refresh."""
    model = routed_mixer()
    made, returned, sizes = refresher(model, every=1), [], []
    for _ in range(3):
        move(model, by=0.5)
        returned.append(made.step())
        sizes.append(sum(len(report["angles"]) for report in made.state_dict()["reports"]))
    assert sizes == [len(MODULES)] * 3
    assert [len(report.angles) for report in made.reports] == [0, 0, len(MODULES)]
    assert all(len(report.angles) == len(MODULES) for report in returned)
    assert made.reports == returned
    assert [report.largest_angle for report in made.reports] == [
        max(max(each) for each in report.angles.values()) for report in returned
    ]
