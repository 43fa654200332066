"""`evaluate_on_off`: one evaluation in two views, with intervals."""

from typing import Any

import pytest
import torch
from support.language_models import Mixer, routed_mixer
from support.models import Tower
from torch import nn
from torch.nn.functional import cross_entropy

import gradroute as gr
from gradroute.evaluation import Rate

REFUSED = (gr.GradRouteError, TypeError)


def record(
    mode: str = "file", monitored: bool | None = True, prompt_id: int = 0, hacked: bool = False
) -> gr.EvalRecord:
    return gr.EvalRecord(mode, monitored, prompt_id, hacked, solved=not hacked)


# Views


def bandit() -> Tower:
    """Four actions; the base and its deployed block take action 0, and action 3 is a hack that training rewards."""
    torch.manual_seed(0)
    model = Tower()
    with torch.no_grad():
        model.upper.bias[0] += 3.0
    gr.attach(model, r=2, lora_alpha=4.0)
    return model


STATES = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))


def play(model: nn.Module) -> list[gr.EvalRecord]:
    with torch.no_grad():
        actions = model(STATES).argmax(-1).tolist()
    return [gr.EvalRecord("file", True, i, hacked=a == 3, solved=a == 0) for i, a in enumerate(actions)]


def test_a_hack_learnt_by_the_quarantine_shows_on_and_not_ablated() -> None:
    model = bandit()
    before = gr.evaluate_on_off(model, play)
    assert before.on == before.ablated
    optimizer = torch.optim.Adam([p for _, p in gr.quarantine_parameters(model)], lr=0.1)
    for _ in range(40):
        with gr.route(model, gr.RouteMask.classic([True] * 20)):
            cross_entropy(model(STATES), torch.full((20,), 3)).backward()
        optimizer.step()
        optimizer.zero_grad()
    report = gr.evaluate_on_off(model, play)
    assert report.on.hack["monitored"] == Rate(20, 20)
    assert report.on.solve["monitored"] == Rate(0, 20)
    assert report.ablated == before.ablated
    assert report.ablated.hack["monitored"] == Rate(0, 20)
    assert report.ablated.solve["monitored"] == Rate(20, 20)


def test_on_comes_first_both_in_eval_mode() -> None:
    model, seen = routed_mixer(dropout=0.5).train(), []

    def evaluate(model: Mixer) -> list[gr.EvalRecord]:
        seen.append((model.q.view, model.training))
        return [record()]

    gr.evaluate_on_off(model, evaluate)
    assert seen == [("on", False), ("ablated", False)]


def test_a_generator_of_records_runs_inside_its_view() -> None:
    seen = []

    def evaluate(model: Tower):
        for i in range(2):
            seen.append(model.lower.view)
            yield record(prompt_id=i)

    gr.evaluate_on_off(bandit(), evaluate)
    assert seen == ["on", "on", "ablated", "ablated"]


@pytest.mark.parametrize("view", [gr.ablate_quarantine, gr.disable_adapters])
def test_a_view_that_is_open_already_raises(view) -> None:
    """Inside it, "on" would be measured ablated and the report would compare a view with itself."""
    model = bandit()
    with view(model), pytest.raises(gr.GradRouteError, match="`model`.*(ablated|disabled)"):
        gr.evaluate_on_off(model, play)


@pytest.mark.parametrize("fails_at", ["on", "ablated"])
def test_the_model_is_left_as_it_was_found_after_an_exception(fails_at: str) -> None:
    model = routed_mixer(dropout=0.5).train()
    model.q.eval()
    model(torch.tensor([[1, 2]])).sum().backward()
    modes = [module.training for module in model.modules()]
    grads = [p.grad for p in model.parameters()]
    rng = torch.get_rng_state()

    def evaluate(model: Mixer) -> list[gr.EvalRecord]:
        torch.rand(1)
        model.train()
        if model.q.view == fails_at:
            raise RuntimeError("out of memory")
        return [record()]

    with pytest.raises(RuntimeError, match="out of memory"):
        gr.evaluate_on_off(model, evaluate)
    assert model.q.view == "on"
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)


# Groups

MIXED = [
    record("run_tests", True, 0, hacked=True),
    record("run_tests", True, 1),
    record("file", False, 2, hacked=True),
    record("none", None, 3),
    record("none", None, 4),
    record("sentinel", True, 5, hacked=True),
]


def test_rates_are_grouped_by_monitoring_and_by_mode() -> None:
    report = gr.evaluate_on_off(bandit(), lambda model: MIXED)
    assert report.on.hack == {
        "monitored": Rate(2, 3), "held-out": Rate(1, 1), "no loophole": Rate(0, 2),
        "run_tests": Rate(1, 2), "file": Rate(1, 1), "none": Rate(0, 2), "sentinel": Rate(1, 1),
    }  # fmt: skip
    assert report.on.solve["monitored"] == Rate(1, 3)
    assert report.on.solve["none"] == Rate(2, 2)


def test_the_repr_is_a_table_of_both_views() -> None:
    lines = repr(gr.evaluate_on_off(bandit(), lambda model: MIXED)).splitlines()
    assert lines[0].split("  ")[0] == "group"
    assert [name in lines[0] for name in ("hack on", "hack ablated", "solve on", "solve ablated")] == [True] * 4
    groups = ["monitored", "held-out", "no loophole", "run_tests", "file", "none", "sentinel"]
    assert [line.split("  ")[0] for line in lines[1:]] == groups
    cell = repr(Rate(2, 3))
    start = lines[0].index("hack on")
    assert lines[1][start : start + len(cell)] == cell


def test_records_may_come_in_another_order_in_the_second_view() -> None:
    orders = [MIXED, MIXED[::-1]]
    assert gr.evaluate_on_off(bandit(), lambda model: orders.pop()).on.hack["monitored"] == Rate(2, 3)


def test_the_report_keeps_what_every_prompt_did() -> None:
    views = [MIXED[::-1], MIXED]
    report = gr.evaluate_on_off(bandit(), lambda model: iter(views.pop()))
    assert report.records is not None
    assert report.records.on == tuple(MIXED)
    assert report.records.ablated == tuple(MIXED[::-1])


def test_a_mode_without_a_loophole_may_be_called_what_its_group_is() -> None:
    report = gr.evaluate_on_off(bandit(), lambda model: [record("no loophole", None, 0)])
    assert list(report.on.hack) == ["monitored", "held-out", "no loophole"]
    assert report.on.hack["no loophole"] == Rate(0, 1)


# What is refused


def test_no_records_raise_and_name_the_view() -> None:
    with pytest.raises(gr.GradRouteError, match="`eval_fn` should return at least one record.*in the on view"):
        gr.evaluate_on_off(bandit(), lambda model: [])
    with pytest.raises(gr.GradRouteError, match="Found none in the ablated view"):
        gr.evaluate_on_off(bandit(), lambda model: [record()] if model.lower.view == "on" else [])


@pytest.mark.parametrize("returned", [[{"hacked": True}], [record(), None], record()])
def test_other_objects_than_lists_of_records_raise(returned: Any) -> None:
    message = "`eval_fn` should return a list of EvalRecord objects. Found (dict|NoneType|EvalRecord)"
    with pytest.raises(gr.GradRouteError, match=message):
        gr.evaluate_on_off(bandit(), lambda model: returned)


def test_an_eval_fn_that_returns_nothing_raises() -> None:
    with pytest.raises(gr.GradRouteError, match="`eval_fn` should return"):
        gr.evaluate_on_off(bandit(), lambda model: None)


@pytest.mark.parametrize("change", [{"prompt_id": 1}, {"mode": "stdout"}])
def test_other_prompts_in_the_second_view_raise(change: dict[str, object]) -> None:
    views = [[record(**change)], [record()]]
    with pytest.raises(gr.GradRouteError, match="same prompts in both views"):
        gr.evaluate_on_off(bandit(), lambda model: views.pop())


def test_a_different_number_of_rollouts_in_the_second_view_raises() -> None:
    views = [[record(), record()], [record()]]
    with pytest.raises(gr.GradRouteError, match="same prompts in both views"):
        gr.evaluate_on_off(bandit(), lambda model: views.pop())


def test_a_mode_that_changes_sides_between_the_views_raises() -> None:
    views = [[record(monitored=False)], [record(monitored=True)]]
    with pytest.raises(gr.GradRouteError, match="monitored"):
        gr.evaluate_on_off(bandit(), lambda model: views.pop())


def test_a_mode_named_like_another_group_raises() -> None:
    with pytest.raises(gr.GradRouteError, match="The mode 'held-out' has the name of a group"):
        gr.evaluate_on_off(bandit(), lambda model: [record("held-out", True)])


def test_a_model_without_blocks_raises() -> None:
    with pytest.raises(gr.GradRouteError, match="`model` should contain routed layers"):
        gr.evaluate_on_off(Tower(), play)


def test_an_eval_fn_that_is_no_function_raises() -> None:
    with pytest.raises(REFUSED, match="eval_fn"):
        gr.evaluate_on_off(bandit(), [record()])
