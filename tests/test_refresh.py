"""`Refresher`: it fires on schedule, changes what it should, and raises where it would change nothing."""

import copy
import dataclasses
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from language_models import IMPORT_HOOK, MODULES, PAIRS, Mixer, ids_only, optimizer_for, routed_mixer, train_step

import gradroute as gr

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
    assert repr(report) == f"RefreshReport(step 3, age 3, overlap {report.overlap:.3f}, version 1)"
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
