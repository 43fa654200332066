"""`Refresher.watch`: steps of the optimizer are counted against its own, and gates have to hold its directions."""

import copy

import pytest
import torch
from support.language_models import optimizer_for, routed_mixer, train_step
from support.refreshing import REFUSED, refresher

import gradroute as gr
from gradroute.gates.quantile import QuantileGate
from gradroute.gates.threshold import ThresholdGate


def test_a_watched_loop_in_order_is_left_alone() -> None:
    model = routed_mixer()
    optimizer, made = optimizer_for(model), refresher(model, every=2)
    gate = gr.BandGate(made.directions)
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
    made = refresher(model).watch(optimizer_for(model))
    with pytest.raises(gr.errors.RefreshError, match="Found 0 optimizer steps and 1 of the refresher"):
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
    with pytest.raises(gr.errors.RefreshError, match="Found 2 optimizer steps and 3 of the refresher"):
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
    with pytest.raises(gr.errors.RefreshError, match="Found 2 optimizer steps and 1"):
        wrapper.step()


@pytest.mark.parametrize("make", [gr.LabelGate, lambda: ThresholdGate(0.5)])
def test_a_gate_without_directions_cannot_be_reached_by_a_refresh(make) -> None:
    with pytest.raises(gr.errors.RefreshError, match="Found no directions in a .*Gate, so no refresh reaches it"):
        refresher(routed_mixer()).watch(make())


@pytest.mark.corner("a gate holds a copy of the directions that are refreshed", "`watch` raises `RefreshError`")
@pytest.mark.parametrize("kind", [gr.BandGate, QuantileGate])
def test_a_gate_on_a_copy_of_the_directions_raises(kind) -> None:
    made = refresher(routed_mixer())
    with pytest.raises(
        gr.errors.RefreshError, match="Found others: Directions.* in a .*Gate, so no refresh reaches it"
    ):
        made.watch(kind(copy.deepcopy(made.directions)))


def test_a_gate_that_is_given_other_directions_later_raises_too() -> None:
    model = routed_mixer()
    made = refresher(model)
    gate = gr.BandGate(made.directions)
    made.watch(gate)
    gate.directions = copy.deepcopy(made.directions)
    for use in (made.step, made.refresh, lambda: gate(torch.tensor([0.0]))):
        with pytest.raises(gr.errors.RefreshError, match="should hold the directions that are refreshed"):
            use()


@pytest.mark.parametrize("what", [None, "adam"])
def test_only_optimizers_and_gates_are_watched(what: object) -> None:
    with pytest.raises(REFUSED, match="watched"):
        refresher(routed_mixer()).watch(what)
