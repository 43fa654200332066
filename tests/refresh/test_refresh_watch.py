"""`Refresher.watch`: steps of the optimizer are counted against its own, and gates have to hold its directions."""

import copy
import gc
import pickle

import pytest
import torch
from support.language_models import MODULES, PAIRS, Mixer, ids_only, optimizer_for, routed_mixer, train_step
from support.refreshing import REFUSED, ablated, refresher

import gradroute as gr
from gradroute.gates.quantile import QuantileGate
from gradroute.gates.threshold import ThresholdGate

pytestmark = pytest.mark.touches_peft


def test_a_watched_loop_in_order_is_left_alone() -> None:
    model = routed_mixer()
    optimizer, made = optimizer_for(model), refresher(model, every=2)
    gate = gr.BandGate(made.directions)
    made.watch(optimizer, gate)
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
    with pytest.raises(gr.errors.RefreshError, match="Found 1 optimizer steps and 0 of the refresher.*Fix: call it"):
        train_step(model, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(gr.errors.RefreshError, match="1 optimizer steps and 0 of the refresher"):
        made.refresh()
    assert made.directions.version == 0
    assert made.step() is None


@pytest.mark.corner("an optimizer step without `refresher.step()`", "the watched gate raises at its next call")
def test_a_step_that_the_refresher_does_not_hear_of_raises_at_the_gate() -> None:
    model = routed_mixer()
    optimizer, made = optimizer_for(model), refresher(model)
    gates = [gr.BandGate(made.directions), QuantileGate(made.directions)]
    made.watch(optimizer, *gates)
    train_step(model, optimizer)
    for gate, rows in zip(gates, (torch.tensor([0.0]), made.directions.hack), strict=True):
        with pytest.raises(gr.errors.RefreshError, match="1 optimizer steps and 0 of the refresher"):
            gate(rows)
    made.step()
    for gate, rows in zip(gates, (torch.tensor([0.0]), made.directions.hack), strict=True):
        gate(rows)


def test_a_step_of_the_refresher_without_one_of_the_optimizer_raises() -> None:
    model = routed_mixer()
    made = refresher(model)
    made.watch(optimizer_for(model))
    with pytest.raises(gr.errors.RefreshError, match="Found 0 optimizer steps and 1 of the refresher"):
        made.step()


def test_an_optimizer_is_counted_from_when_it_is_watched() -> None:
    model = routed_mixer()
    optimizer, made = optimizer_for(model), refresher(model)
    train_step(model, optimizer)
    made.step()
    made.watch(optimizer)
    train_step(model, optimizer)
    made.step()
    train_step(model, optimizer)
    with pytest.raises(gr.errors.RefreshError, match="Found 3 optimizer steps and 2 of the refresher"):
        train_step(model, optimizer)


def one_per_block(model: Mixer) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.SGD([p for _, p in parameters(model)], lr=0.01)
        for parameters in (gr.deployed_parameters, gr.quarantine_parameters)
    ]


@pytest.mark.corner("two optimizers, one per block", "each has its count")
def test_each_of_two_optimizers_steps_once_per_step_of_the_refresher() -> None:
    model = routed_mixer()
    (first, second), made = one_per_block(model), refresher(model, every=2)
    made.watch(first, second)
    for step in range(4):
        train_step(model, first, seed=step)
        second.step()
        made.step()
    assert [report.step for report in made.reports] == [2, 4]
    train_step(model, first)
    with pytest.raises(gr.errors.RefreshError, match="Found 5 optimizer steps and 4 of the refresher"):
        first.step()
    with pytest.raises(gr.errors.RefreshError, match="Found 4 optimizer steps and 5 of the refresher"):
        made.step()


# Optimizers that do not hold the blocks


@pytest.mark.corner("the optimizer was made before `attach`", "`watch` raises `RefreshError`")
def test_an_optimizer_that_was_made_before_attach_raises() -> None:
    torch.manual_seed(0)
    model = Mixer().double()
    optimizer = torch.optim.AdamW(model.parameters())
    gr.attach(model, r=2, lora_alpha=4.0, target_modules=MODULES)
    made = refresher(model)
    message = r"lacks 16 of 16, those of `q`, `k`, `v`, `out`: .*make the optimizer after attach"
    with pytest.raises(gr.errors.RefreshError, match=message):
        made.watch(optimizer)
    optimizer.step()


@pytest.mark.parametrize("missing", [0, 1])
def test_an_optimizer_of_one_block_raises_unless_the_other_is_frozen(missing: int) -> None:
    model = routed_mixer()
    made, optimizers = refresher(model), one_per_block(model)
    del optimizers[missing]
    with pytest.raises(gr.errors.RefreshError, match="lacks 8 of 16.*name all of them"):
        made.watch(*optimizers)
    for _, parameter in (gr.deployed_parameters, gr.quarantine_parameters)[missing](model):
        parameter.requires_grad_(False)
    made.watch(*optimizers)


def test_an_optimizer_of_another_model_raises_and_nothing_is_watched() -> None:
    model = routed_mixer()
    made = refresher(model)
    gate, other = gr.BandGate(made.directions), optimizer_for(routed_mixer())
    with pytest.raises(gr.errors.RefreshError, match="should hold every parameter of the blocks"):
        made.watch(gate, other)
    made.step()
    gate(torch.tensor([0.0]))


# The end of a watch


def test_a_closed_watch_leaves_the_optimizer_and_the_gate_alone() -> None:
    model = routed_mixer()
    optimizer, made = optimizer_for(model), refresher(model)
    gate = gr.BandGate(made.directions)
    with made.watch(optimizer, gate) as watch:
        assert repr(watch) == f"Watch({made!r}, 2 watched)"
        train_step(model, optimizer)
        with pytest.raises(gr.errors.RefreshError):
            gate(torch.tensor([0.0]))
    assert repr(watch).endswith(", closed)")
    train_step(model, optimizer)
    gate(torch.tensor([0.0]))
    gate.directions = copy.deepcopy(made.directions)
    assert [made.step(), made.step(), made.step()] == [None] * 3
    watch.close()
    del made, watch
    gc.collect()
    gate(torch.tensor([0.0]))


@pytest.mark.corner("a second refresher on the same optimizer, the first is gone", "the second takes over")
def test_a_second_refresher_takes_over_optimizer_and_gate_from_one_that_is_gone() -> None:
    model = routed_mixer()
    optimizer, first = optimizer_for(model), refresher(model)
    gate = gr.BandGate(first.directions)
    first.watch(optimizer, gate)
    train_step(model, optimizer)
    second = gr.Refresher(first.directions, first.extract, model=model, every=1)
    del first
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks
    second.watch(optimizer, gate)
    train_step(model, optimizer)
    assert second.step().version == 1
    gate(torch.tensor([0.0]))


def test_a_watched_gate_without_its_refresher_raises() -> None:
    model = routed_mixer()
    made = refresher(model)
    directions, gate = made.directions, gr.BandGate(made.directions)
    watch = made.watch(gate)
    del made
    gate(torch.tensor([0.0]))
    del watch
    gc.collect()
    with pytest.raises(gr.errors.RefreshError, match="was deleted, so nothing refreshes the directions.*Fix: keep"):
        gate(torch.tensor([0.0]))
    gr.BandGate(directions)(torch.tensor([0.0]))


@pytest.mark.corner("a watched gate is copied or pickled", "without refresher, optimizer and model")
def test_copies_and_pickles_of_a_watched_gate_carry_no_refresher() -> None:
    model = routed_mixer()
    optimizer, made = optimizer_for(model), refresher(model)
    for gate in (gr.BandGate(made.directions), QuantileGate(made.directions)):
        made.watch(optimizer, gate)
        found: set[int] = set()
        for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
            assert twin.directions is not gate.directions
            assert twin.state_dict().keys() == gate.state_dict().keys()
            found |= {len(pickle.dumps(twin))}
        assert max(found) < len(pickle.dumps(made.directions)) + 5000
    pickle.loads(pickle.dumps(gr.LabelGate(recall=0.5)))
    train_step(model, optimizer)
    with pytest.raises(gr.errors.RefreshError):
        gate(made.directions.hack)
    copy.deepcopy(gate)(made.directions.hack)


# Filters


def test_a_watched_filter_is_held_to_the_same() -> None:
    model = routed_mixer()
    directions = ablated(
        model, lambda m: gr.extract_gradient_directions(m, PAIRS, forward_fn=ids_only, features="parameter")
    )
    made = gr.Refresher(directions, lambda: None, model=model)
    f = gr.ProjectionFilter(directions, mode="measure")
    optimizer = optimizer_for(model)
    made.watch(optimizer, f)
    with pytest.raises(gr.errors.RefreshError, match="A watched ProjectionFilter should hold the directions"):
        made.watch(gr.ProjectionFilter(copy.deepcopy(directions), mode="measure"))
    train_step(model, optimizer)
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    with pytest.raises(gr.errors.RefreshError, match="1 optimizer steps and 0 of the refresher"):
        gr.apply_filter(model, f)
    made.step()
    gr.apply_filter(model, f)


# Without a watch


@pytest.mark.corner(
    "a refresher without a watch is never stepped", "the gate raises once more than `every` steps were taken"
)
@pytest.mark.parametrize(
    ("settings", "allowed"), [({"every": 3}, 4), ({"every": 1}, 2), ({"every": 2, "warm_up": 5}, 6)]
)
def test_a_refresher_that_is_never_stepped_raises_at_the_gate_without_a_watch_too(
    settings: dict[str, int], allowed: int
) -> None:
    model = routed_mixer()
    optimizer, made = optimizer_for(model), refresher(model, **settings)
    gate = gr.BandGate(made.directions)
    for step in range(allowed):
        for _ in range(3):
            gate.flags(torch.tensor([0.0, 9.0]))
        train_step(model, optimizer, seed=step)
    with pytest.raises(gr.errors.RefreshError, match=f"changed {allowed} times since it was last called.*Fix: call it"):
        gate.flags(torch.tensor([0.0, 9.0]))
    del made
    gc.collect()
    gate.flags(torch.tensor([0.0, 9.0]))


def test_a_refresher_that_is_stepped_is_left_alone_without_a_watch() -> None:
    model = routed_mixer()
    optimizer, made = optimizer_for(model), refresher(model, every=1)
    gate = QuantileGate(made.directions)
    for step in range(5):
        gate(made.directions.hack)
        train_step(model, optimizer, seed=step)
        gate(made.directions.hack)
        made.step()
    assert made.steps == made.directions.version == 5


# What is watched


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
    with pytest.raises(gr.errors.RefreshError, match="Found 2 optimizer steps and 1"):
        wrapper.step()


@pytest.mark.parametrize("make", [gr.LabelGate, lambda: ThresholdGate(0.5)])
def test_a_gate_without_directions_cannot_be_reached_by_a_refresh(make) -> None:
    with pytest.raises(gr.errors.RefreshError, match="A watched .*Gate should hold .* Found no directions: no refresh"):
        refresher(routed_mixer()).watch(make())


@pytest.mark.corner("a gate holds a copy of the directions that are refreshed", "`watch` raises `RefreshError`")
@pytest.mark.parametrize("kind", [gr.BandGate, QuantileGate])
def test_a_gate_on_a_copy_of_the_directions_raises(kind) -> None:
    made = refresher(routed_mixer())
    with pytest.raises(
        gr.errors.RefreshError, match="A watched .*Gate should hold .* Found others: Directions.*: no refresh"
    ):
        made.watch(kind(copy.deepcopy(made.directions)))


def test_a_gate_that_is_given_other_directions_later_raises_too() -> None:
    model = routed_mixer()
    optimizer, made = optimizer_for(model), refresher(model)
    gate = gr.BandGate(made.directions)
    made.watch(optimizer, gate)
    gate.directions = copy.deepcopy(made.directions)
    uses = (lambda: train_step(model, optimizer), made.step, made.refresh, lambda: gate(torch.tensor([0.0])))
    for use in uses:
        with pytest.raises(gr.errors.RefreshError, match="should hold the directions that are refreshed"):
            use()


@pytest.mark.parametrize("what", [(None,), ("adam",), ()])
def test_only_optimizers_gates_and_filters_are_watched(what: tuple[object, ...]) -> None:
    with pytest.raises(REFUSED, match="watched"):
        refresher(routed_mixer()).watch(*what)
