"""`Refresher` of a resumed run: it goes on from its state, and refuses another's."""

import copy

import pytest
import torch
from support.language_models import MODULES, Mixer, optimizer_for, routed_mixer
from support.refreshing import ablated, activations, move, refresher

import gradroute as gr

pytestmark = pytest.mark.touches_peft


def test_a_resumed_run_goes_on_counting_steps() -> None:
    """Directions that were extracted at step 40 are not made younger by a new Refresher."""
    model = routed_mixer()
    directions = ablated(model).update_(ablated(model), step=40)
    made = gr.Refresher(directions, lambda: activations(model), model=model, every=2)
    move(model)
    made.step()
    assert made.step().step == 42
    assert directions.step == 42


def test_a_refresher_goes_on_from_its_state(tmp_path) -> None:
    def make(model: Mixer, directions: gr.Directions) -> gr.Refresher:
        return gr.Refresher(directions, lambda: activations(model), model=model, every=3)

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
    idle = optimizer_for(model, lr=0.0)
    made = make(model, directions)
    made.watch(idle)
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
    with pytest.raises(gr.errors.RefreshError, match="bitwise the same"):
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
        with pytest.raises(gr.errors.FileFormatError, match=message):
            made.load_state_dict(wrong)
    with pytest.raises(gr.errors.RefreshError, match="8 deployed parameters. Found 1"):
        made.load_state_dict({**state, "fingerprint": [1]})
