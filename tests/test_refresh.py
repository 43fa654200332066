"""`Refresher`: it fires on schedule, changes what it should, and raises where it would change nothing."""

import copy
import dataclasses
import json
import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from language_models import (
    IMPORT_HOOK,
    MODULES,
    PAIRS,
    Mixer,
    ids_only,
    optimizer_for,
    routed_mixer,
    train_step,
)

import gradroute as gr
from gradroute.routing.gates import ThresholdGate
from gradroute.routing.quantile_gate import QuantileGate

REFUSED = (gr.GradRouteError, TypeError)
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def activations(model: Mixer) -> gr.Directions:
    return gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only)


def bottleneck_gradients(model: Mixer) -> gr.Directions:
    return gr.extract_gradient_directions(model, PAIRS, forward_fn=ids_only)


def ablated(model: Mixer, extract: Callable[[Mixer], gr.Directions] = activations) -> gr.Directions:
    with gr.ablate_quarantine(model):
        return extract(model)


def move(model: Mixer, by: float = 0.1) -> None:
    """Move the deployed blocks, as an optimizer step would."""
    with torch.no_grad():
        for _, parameter in gr.deployed_parameters(model):
            parameter.add_(by)


def refresher(model: Mixer, extract: Callable[[], object] | None = None, **settings: object) -> gr.Refresher:
    extract = extract or (lambda: activations(model))
    return gr.Refresher(ablated(model), extract, model=model, **settings)


# Schedule


@pytest.mark.parametrize("every", [1, 2, 5])
def test_it_extracts_once_every_so_many_steps(every: int) -> None:
    model, calls = routed_mixer(), []

    def extract() -> gr.Directions:
        calls.append(made.steps)
        return activations(model)

    made = refresher(model, extract, every=every)
    reports = []
    for _ in range(10):
        move(model)
        reports.append(made.step())
    due = list(range(every, 11, every))
    assert calls == due
    assert [i + 1 for i, report in enumerate(reports) if report is not None] == due
    assert [report for report in reports if report is not None] == made.reports


def test_every_five_steps_is_the_default() -> None:
    assert refresher(routed_mixer()).every == 5


def ablated_gradients(model: Mixer) -> gr.Directions:
    return ablated(model, bottleneck_gradients)


def control(model: Mixer) -> gr.Directions:
    return ablated(model).random_like(seed=1)


@pytest.mark.parametrize(
    ("make", "extract"),
    [
        (ablated, activations),
        (control, activations),
        (lambda m: ablated(m, bottleneck_gradients), bottleneck_gradients),
    ],
    ids=["activation", "random", "gradient"],
)
def test_it_fires_in_training_with_every_kind_of_directions(make, extract) -> None:
    model = routed_mixer()
    optimizer, directions = optimizer_for(model), make(model)
    gate = gr.BandGate.calibrate(directions)
    made = gr.Refresher(directions, lambda: extract(model), model=model, every=2)
    rows, ends, features = dict(directions.rows), [gate.ends], [directions.hack["out"]]
    for step in range(6):
        train_step(model, optimizer, seed=step)
        report = made.step()
        assert (report is not None) == (step % 2 == 1)
        if report is not None:
            ends.append(gate.ends)
            features.append(directions.hack["out"])
    assert [(report.step, report.age, report.moved, report.version) for report in made.reports] == [
        (2, 2, True, 1), (4, 2, True, 2), (6, 2, True, 3)
    ]  # fmt: skip
    assert len(set(ends)) == 4
    assert not any(torch.equal(a, b) for a, b in pairwise(features))
    kept = all(torch.equal(directions.rows[name], rows[name]) for name in MODULES)
    assert kept == (make is control)
    fresh = ablated(model, extract)
    assert all(torch.equal(directions.hack[name], fresh.hack[name]) for name in MODULES)


# What a refresh does


def test_the_same_object_is_updated_so_that_a_gate_sees_it() -> None:
    model = routed_mixer()
    made = refresher(model)
    directions = made.directions
    gate = gr.BandGate.calibrate(directions)
    before = gate.ends
    move(model)
    made.refresh()
    fresh = ablated(model)
    assert made.directions is directions
    assert all(torch.equal(directions.rows[name], fresh.rows[name]) for name in MODULES)
    assert gate.ends != before
    assert gate.ends == gr.BandGate.calibrate(fresh).ends


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


def test_a_swap_of_two_weights_is_a_move() -> None:
    model = routed_mixer()
    stale = ablated(model)
    made = refresher(model, lambda: stale)
    with torch.no_grad():
        for _, parameter in gr.deployed_parameters(model):
            parameter.copy_(parameter.flip(0))
    with pytest.raises(gr.RefreshError, match="bitwise the same"):
        made.refresh()


def test_directions_taken_before_training_in_the_on_view_can_be_refreshed() -> None:
    model = routed_mixer()
    made = gr.Refresher(activations(model), lambda: activations(model), model=model)
    assert made.directions.provenance.view == "on"
    move(model)
    made.refresh()
    assert made.directions.provenance.view == "ablated"


# What extraction sees, and what is put back


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
        assert IMPORT_HOOK or random.getstate() == python_rng
        assert {(layer.view, layer.has_open_route) for layer in (model.q, model.v, model.out)} == {("scaled", True)}
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


# Each way to be a no-op


def test_no_directions_to_refresh_raise() -> None:
    """The event that founded this library: an arm without directions, and a refresh that never happened."""
    model = routed_mixer()
    with pytest.raises(REFUSED, match="directions"):
        gr.Refresher(None, lambda: activations(model), model=model, every=5)


@pytest.mark.parametrize("extract", [None, "directions"])
def test_an_extract_that_is_no_function_raises(extract: object) -> None:
    model = routed_mixer()
    with pytest.raises(REFUSED, match="extract"):
        gr.Refresher(ablated(model), extract, model=model)


def test_directions_in_the_place_of_extract_raise() -> None:
    model = routed_mixer()
    with pytest.raises(REFUSED, match="extract"):
        gr.Refresher(ablated(model), activations(model), model=model)


@pytest.mark.parametrize("every", [0, -1, True, 2.5, None])
def test_a_schedule_without_steps_raises(every: object) -> None:
    with pytest.raises(REFUSED, match="every"):
        refresher(routed_mixer(), every=every)


def test_a_model_without_blocks_raises() -> None:
    with pytest.raises(gr.GradRouteError, match="`model` should contain routed layers"):
        gr.Refresher(ablated(routed_mixer()), lambda: None, model=Mixer())


@pytest.mark.parametrize("returned", [None, {"rows": 1}])
def test_an_extract_that_returns_no_directions_raises(returned: object) -> None:
    model = routed_mixer()
    made = refresher(model, lambda: returned, every=1)
    move(model)
    with pytest.raises(gr.RefreshError, match=f"`extract` should return Directions. Found {type(returned).__name__}"):
        made.step()


def test_an_extract_that_returns_the_same_object_raises() -> None:
    model = routed_mixer()
    made = refresher(model, lambda: made.directions, every=1)
    for moved in (False, True):
        if moved:
            move(model)
        with pytest.raises(gr.RefreshError, match="very object|bitwise the same"):
            made.step()
    assert made.directions.version == 0


def test_a_stale_cache_raises_once_the_deployed_parameters_moved() -> None:
    model = routed_mixer()
    cache = ablated(model)
    made = refresher(model, lambda: cache, every=1)
    assert not made.step().moved
    move(model, by=1e-6)
    with pytest.raises(gr.RefreshError, match="deployed parameters moved .* bitwise the same.*Fix: .*copy or a cache"):
        made.step()
    assert made.directions.version == 1


def test_features_that_do_not_depend_on_the_trained_blocks_raise() -> None:
    model = routed_mixer()

    def inputs() -> gr.Directions:
        return gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only, features="input")

    gr.attach(gr.detach(model), r=2, target_modules=["q"])
    with gr.ablate_quarantine(model):
        directions = inputs()
    made = gr.Refresher(directions, inputs, model=model)
    move(model)
    with pytest.raises(gr.RefreshError, match="features that depend on the trained blocks"):
        made.refresh()


def test_extraction_from_a_copy_of_the_model_raises() -> None:
    model = routed_mixer()
    frozen = copy.deepcopy(model)
    made = refresher(model, lambda: activations(frozen))
    move(model)
    with pytest.raises(gr.RefreshError, match="quarantine ablated. Found 'on'.*the model that was given"):
        made.refresh()


def test_extraction_from_an_ablated_copy_of_the_model_raises() -> None:
    model = routed_mixer()
    frozen = copy.deepcopy(model)
    made = refresher(model, lambda: ablated(frozen))
    move(model)
    with pytest.raises(gr.RefreshError, match="bitwise the same.*copy"):
        made.refresh()


def test_an_ablated_copy_is_found_out_by_the_second_refresh_where_the_first_directions_are_of_the_on_view() -> None:
    model = routed_mixer()
    frozen = copy.deepcopy(model)
    made = gr.Refresher(activations(model), lambda: ablated(frozen), model=model)
    move(model)
    made.refresh()
    move(model)
    with pytest.raises(gr.RefreshError, match="bitwise the same.*copy"):
        made.refresh()


def test_a_view_of_its_own_inside_extract_raises() -> None:
    model = routed_mixer()

    def disabled() -> gr.Directions:
        with gr.disable_adapters(model):
            return activations(model)

    made = refresher(model, disabled)
    move(model)
    with pytest.raises(gr.RefreshError, match="`extract` should measure `model` .* Found 'disabled'"):
        made.refresh()


def test_a_refresh_inside_disabled_adapters_raises() -> None:
    model = routed_mixer()
    made = refresher(model)
    move(model)
    with gr.disable_adapters(model), pytest.raises(gr.RefreshError, match="Found 'disabled'"):
        made.refresh()


def test_extraction_from_other_pairs_raises() -> None:
    model = routed_mixer()
    made = refresher(model, lambda: gr.extract_activation_directions(model, PAIRS[:2], forward_fn=ids_only))
    move(model)
    with pytest.raises(gr.RefreshError, match="`fresh` should have the pair_hash"):
        made.refresh()


def test_extraction_with_other_settings_raises() -> None:
    model = routed_mixer()
    made = refresher(
        model, lambda: gr.extract_activation_directions(model, PAIRS, forward_fn=ids_only, reduction="last")
    )
    move(model)
    with pytest.raises(gr.RefreshError, match="`fresh` should have the reduction"):
        made.refresh()


def test_two_refreshers_of_the_same_directions_raise() -> None:
    model = routed_mixer()
    first = refresher(model)
    second = gr.Refresher(first.directions, first.extract, model=model)
    move(model)
    first.refresh()
    with pytest.raises(gr.RefreshError, match="updated by this refresher alone. Found version 1 instead of 0"):
        second.refresh()


def test_a_resumed_run_goes_on_counting_steps() -> None:
    """Directions that were extracted at step 40 are not made younger by a new Refresher."""
    model = routed_mixer()
    directions = ablated(model).update_(ablated(model), step=40)
    made = gr.Refresher(directions, lambda: activations(model), model=model, every=2)
    move(model)
    made.step()
    assert made.step().step == 42
    assert directions.step == 42


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


# Warm-up and overlap


@pytest.mark.parametrize(("warm_up", "due"), [(0, [2, 4, 6, 8]), (2, [2, 4, 6, 8]), (3, [3, 5, 7]), (7, [7])])
def test_no_refresh_is_due_during_the_warm_up(warm_up: int, due: list[int]) -> None:
    model = routed_mixer()
    made = refresher(model, every=2, warm_up=warm_up)
    for _ in range(8):
        expected = next(step for step in (*due, 9) if step > made.steps) - made.steps
        assert f"next in {expected}" in repr(made) or expected + made.steps == 9
        move(model)
        made.step()
    assert [report.step for report in made.reports] == due


def test_a_warm_up_counts_the_steps_of_the_run() -> None:
    model = routed_mixer()
    directions = ablated(model).update_(ablated(model), step=40)
    made = gr.Refresher(directions, lambda: activations(model), model=model, every=1, warm_up=41)
    move(model)
    assert made.step().step == 41


def test_after_a_refresh_with_a_low_overlap_the_next_step_is_due() -> None:
    model = routed_mixer()
    made = refresher(model, every=4, min_overlap=0.9)
    jumps = {4: 2.0, 5: 2.0}
    for step in range(1, 11):
        move(model, by=jumps.get(step, 1e-4))
        made.step()
    assert [report.step for report in made.reports] == [4, 5, 6, 10]
    low = [report.overlap < 0.9 for report in made.reports]
    assert low == [True, True, False, False]
    assert "every 4 steps or below an overlap of 0.9" in repr(made)


def test_a_probe_calls_for_a_refresh_when_it_has_turned() -> None:
    model, probes = routed_mixer(), []

    def probe() -> gr.Directions:
        probes.append(model.q.view)
        return gr.extract_activation_directions(model, PAIRS[:2], forward_fn=ids_only)

    made = refresher(model, every=None, min_overlap=0.95, probe=probe)
    for step in range(1, 7):
        move(model, by=1.0 if step in (3, 4) else 1e-4)
        made.step()
    assert [report.step for report in made.reports] == [3, 4]
    assert len(probes) == 1 + 6 + 2
    assert set(probes) == {"ablated"}
    assert "Refresher(below an overlap of 0.95, 2 done, age 2)" in repr(made)


def test_a_probe_is_compared_with_itself_at_the_last_refresh() -> None:
    """Slow drift adds up: no step turns it by much."""
    model = routed_mixer()
    made = refresher(model, every=None, min_overlap=0.98, probe=lambda: activations(model))
    for _ in range(12):
        move(model, by=0.02)
        made.step()
    assert made.reports
    assert made.reports[0].step > 1
    assert all(report.overlap < 0.98 for report in made.reports)


def test_a_random_control_has_the_schedule_of_the_probe() -> None:
    steps = []
    for make in (ablated, control):
        model = routed_mixer()
        made = gr.Refresher(
            make(model), lambda model=model: activations(model), model=model,
            every=None, min_overlap=0.95, probe=lambda model=model: activations(model),
        )  # fmt: skip
        for _ in range(8):
            move(model, by=0.1)
            made.step()
        steps.append([report.step for report in made.reports])
    assert steps[0] == steps[1] != []


def test_a_probe_that_does_not_see_the_policy_move_raises() -> None:
    model = routed_mixer()
    frozen = ablated(model)
    made = refresher(model, every=None, min_overlap=0.9, probe=lambda: frozen)
    made.step()
    move(model)
    with pytest.raises(gr.RefreshError, match="`probe` returned bitwise the same rows"):
        made.step()


def test_a_probe_that_fails_leaves_the_directions_as_they_were() -> None:
    model, broken = routed_mixer(), []

    def probe() -> gr.Directions | None:
        return None if broken else activations(model)

    def extract() -> gr.Directions:
        broken.append(True)
        return activations(model)

    made = refresher(model, extract, every=1, min_overlap=0.9, probe=probe)
    move(model)
    with pytest.raises(gr.RefreshError, match="`probe` should return Directions. Found NoneType"):
        made.step()
    assert made.directions.version == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": None}, "`every` or `min_overlap` should be given"),
        ({"warm_up": -1}, "`warm_up` should be a number of steps"),
        ({"warm_up": True}, "warm_up"),
        ({"min_overlap": 1.1}, "`min_overlap` should be a cosine"),
        ({"min_overlap": -1.0}, "`min_overlap` should be a cosine"),
        ({"min_overlap": float("nan")}, "`min_overlap` should be a cosine"),
        ({"every": None, "min_overlap": 0.9}, "`min_overlap` without `probe`"),
        ({"probe": lambda: None}, "`probe` needs a `min_overlap`"),
        ({"min_overlap": 0.9, "probe": 3}, "probe"),
    ],
)
def test_schedules_that_could_not_work_raise(settings: dict[str, object], message: str) -> None:
    with pytest.raises(REFUSED, match=message):
        refresher(routed_mixer(), **settings)


@pytest.mark.parametrize("make", [control, lambda m: ablated(m).shuffled(seed=0), lambda m: ablated(m).reversed()])
def test_the_overlap_of_a_control_is_no_schedule(make) -> None:
    model = routed_mixer()
    with pytest.raises(gr.RefreshError, match="control with itself is not that of the directions it controls"):
        gr.Refresher(make(model), lambda: activations(model), model=model, min_overlap=0.9)


# Watching the optimizer and the gates


def test_a_watched_loop_in_order_is_left_alone() -> None:
    model = routed_mixer()
    optimizer, made = optimizer_for(model), refresher(model, every=2)
    gate = gr.BandGate.calibrate(made.directions)
    assert made.watch(optimizer, gate) is made
    for step in range(4):
        gate(torch.tensor([0.0, 9.0]))
        train_step(model, optimizer, seed=step)
        made.step()
    assert [report.step for report in made.reports] == [2, 4]


def test_a_step_that_the_refresher_does_not_hear_of_raises_at_the_next() -> None:
    model = routed_mixer()
    optimizer, made = optimizer_for(model), refresher(model)
    made.watch(optimizer)
    train_step(model, optimizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(gr.RefreshError, match="Found 1 optimizer steps and 0 of the refresher.*Fix: call it"):
        train_step(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(gr.RefreshError, match="1 optimizer steps and 0 of the refresher"):
        made.refresh()
    assert made.directions.version == 0
    assert made.step() is None


def test_a_step_that_the_refresher_does_not_hear_of_raises_at_the_gate() -> None:
    model = routed_mixer()
    optimizer, made = optimizer_for(model), refresher(model)
    gates = [gr.BandGate.calibrate(made.directions), QuantileGate(made.directions)]
    made.watch(optimizer, *gates)
    train_step(model, optimizer)
    for gate, rows in zip(gates, (torch.tensor([0.0]), made.directions.hack), strict=True):
        with pytest.raises(gr.RefreshError, match="1 optimizer steps and 0 of the refresher"):
            gate(rows)
    made.step()
    for gate, rows in zip(gates, (torch.tensor([0.0]), made.directions.hack), strict=True):
        gate(rows)


def test_a_step_of_the_refresher_without_one_of_the_optimizer_raises() -> None:
    model = routed_mixer()
    made = refresher(model).watch(optimizer_for(model))
    with pytest.raises(gr.RefreshError, match="Found 0 optimizer steps and 1 of the refresher"):
        made.step()


def test_each_watched_optimizer_is_counted_from_when_it_is_watched() -> None:
    model = routed_mixer()
    optimizer, made = optimizer_for(model), refresher(model)
    train_step(model, optimizer)
    made.step()
    made.watch(optimizer)
    train_step(model, optimizer)
    made.step()
    second = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    made.watch(second)
    train_step(model, optimizer)
    with pytest.raises(gr.RefreshError, match="Found 2 optimizer steps and 3 of the refresher"):
        made.step()


def test_the_optimizer_inside_a_wrapper_is_the_one_that_is_counted() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        def step(self) -> None:
            self.optimizer.step()

    model = routed_mixer()
    optimizer = optimizer_for(model)
    wrapper, made = Wrapper(optimizer), refresher(model)
    made.watch(wrapper)
    wrapper.step()
    assert made.step() is None
    wrapper.step()
    with pytest.raises(gr.RefreshError, match="Found 2 optimizer steps and 1"):
        wrapper.step()


@pytest.mark.parametrize("make", [gr.LabelGate, lambda: ThresholdGate(0.5)])
def test_a_gate_without_directions_cannot_be_reached_by_a_refresh(make) -> None:
    with pytest.raises(gr.RefreshError, match="Found no directions in a .*Gate, so no refresh reaches it"):
        refresher(routed_mixer()).watch(make())


@pytest.mark.parametrize("kind", [gr.BandGate, QuantileGate])
def test_a_gate_on_a_copy_of_the_directions_raises(kind) -> None:
    made = refresher(routed_mixer())
    with pytest.raises(gr.RefreshError, match="Found others: Directions.* in a .*Gate, so no refresh reaches it"):
        made.watch(kind(copy.deepcopy(made.directions)))


def test_a_gate_that_is_given_other_directions_later_raises_too() -> None:
    model = routed_mixer()
    made = refresher(model)
    gate = gr.BandGate.calibrate(made.directions)
    made.watch(gate)
    gate.directions = copy.deepcopy(made.directions)
    for use in (made.step, made.refresh, lambda: gate(torch.tensor([0.0]))):
        with pytest.raises(gr.RefreshError, match="should hold the directions that are refreshed"):
            use()


@pytest.mark.parametrize("what", [None, "adam"])
def test_only_optimizers_and_gates_are_watched(what: object) -> None:
    with pytest.raises(REFUSED, match="watched"):
        refresher(routed_mixer()).watch(what)


# State


@pytest.mark.parametrize("settings", [{"every": 3}, {"every": None, "min_overlap": 0.99, "probe": True}])
def test_a_refresher_goes_on_from_its_state(settings: dict[str, object], tmp_path) -> None:
    def make(model: Mixer, directions: gr.Directions) -> gr.Refresher:
        probe = {"probe": lambda: activations(model)} if "probe" in settings else {}
        return gr.Refresher(directions, lambda: activations(model), model=model, **{**settings, **probe})

    whole_model = routed_mixer()
    whole = make(whole_model, ablated(whole_model))
    for step in range(10):
        if step == 5:
            model = copy.deepcopy(whole_model)
            whole.directions.save(tmp_path / "directions")
            torch.save(whole.state_dict(), tmp_path / "refresher.pt")
        move(whole_model, by=0.04)
        whole.step()
    directions = gr.Directions.load(tmp_path / "directions", model=model)
    idle = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    made = make(model, directions).watch(idle)
    made.load_state_dict(torch.load(tmp_path / "refresher.pt"))
    for _ in range(5):
        move(model, by=0.04)
        idle.step()
        made.step()
    assert made.reports == whole.reports
    assert any(report.step > 5 for report in made.reports)
    assert (made.steps, made.age, directions.version) == (whole.steps, whole.age, whole.directions.version)
    assert all(torch.equal(directions.rows[name], whole.directions.rows[name]) for name in MODULES)


def test_a_resumed_refresher_knows_that_the_policy_had_moved_before() -> None:
    model = routed_mixer()
    made = refresher(model)
    stale = ablated(model)
    move(model)
    made.step()
    resumed = gr.Refresher(made.directions, lambda: stale, model=model)
    assert resumed.state_dict()["fingerprint"] != made.state_dict()["fingerprint"]
    resumed.load_state_dict(made.state_dict())
    with pytest.raises(gr.RefreshError, match="bitwise the same"):
        resumed.refresh()


def test_a_foreign_state_raises() -> None:
    model = routed_mixer()
    made = refresher(model, every=4)
    state = made.state_dict()
    for wrong, message in (
        ({**state, "format": "gradroute-Refresher-0"}, "format gradroute-Refresher-1"),
        (refresher(model, every=3).state_dict(), "every=3. Found 4 here"),
        (gr.LabelGate().state_dict(), "format gradroute-Refresher-1"),
        ({**state, "directions": {**state["directions"], "pair_hash": "f"}}, "pair_hash='f'.*load the Directions"),
        ({**state, "directions": {**state["directions"], "version": 2}}, "version=2. Found 0 here"),
    ):
        with pytest.raises(gr.FileFormatError, match=message):
            made.load_state_dict(wrong)
    with pytest.raises(gr.RefreshError, match="8 deployed parameters. Found 1"):
        made.load_state_dict({**state, "fingerprint": [1]})
