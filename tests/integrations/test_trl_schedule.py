"""Parts of a run: the deployed block starts slowly, and rollouts are sampled ablated from some step on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.trl_runs import Watched, flags, quiet, trained, trainer, wrapped
from torch import Tensor
from transformers import TrainerCallback

import gradroute as gr
from gradroute.integrations.trl._schedule import last_generation

pytestmark = quiet
FLAGGED = {"detector": flags, "detector_recall": 1.0}
ABLATED = {**FLAGGED, "ablated_fraction": 0.25}


def blocks(model: Any) -> dict[str, dict[str, Tensor]]:
    return {
        block: {name: p.detach().clone() for name, p in of(model)}
        for block, of in (("deployed", gr.deployed_parameters), ("quarantine", gr.quarantine_parameters))
    }


class Points(TrainerCallback):
    """The parameters at the beginning, and after each step."""

    def __init__(self) -> None:
        self.points: list[dict[str, dict[str, Tensor]]] = []

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.points.append(blocks(model))

    def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.points.append(blocks(model))


@pytest.mark.parametrize("fraction", [None, 0.5])
def test_the_first_steps_of_the_deployed_block_are_a_fraction(fraction: float | None, tmp_path: Path) -> None:
    """Plain gradient descent, so that a step is the learning rate times the gradient that was there."""
    look = Points()
    made = trained(
        tmp_path, cls=Watched, **FLAGGED, slow_start_steps=2, slow_start_fraction=fraction, callbacks=[look],
        args_max_steps=3, args_optim="sgd", args_max_grad_norm=0.0, args_learning_rate=0.05,
    )  # fmt: skip
    slow = 0.25 if fraction is None else fraction
    for step, factor in enumerate((slow, slow, 1.0)):
        before, after, gradients = look.points[step], look.points[step + 1], made.stepped[step]
        for block, rate in (("deployed", 0.05 * factor), ("quarantine", 0.05)):
            for name, gradient in gradients[block].items():
                moved = after[block][name] - before[block][name]
                torch.testing.assert_close(moved, -rate * gradient, rtol=1e-3, atol=1e-7)
    assert max(float(g.abs().max()) for g in made.stepped[0]["deployed"].values()) > 1e-3
    assert [entry["routing/slow_start"] for entry in made.state.log_history[:3]] == [1, 1, 0]
    assert {entry["learning_rate"] for entry in made.state.log_history[:3]} == {0.05}


def test_every_run_starts_anew(tmp_path: Path) -> None:
    made = trained(tmp_path, **FLAGGED, slow_start_steps=1)
    made.train()
    steps = [entry["routing/slow_start"] for entry in made.state.log_history if "routing/slow_start" in entry]
    assert steps == [1, 0]  # the second run's: TRL's history is of the last run
    assert made._schedule.state_dict()["done"] == 2


def test_groups_of_parameters_are_split_by_block_for_a_slow_start_only(tmp_path: Path) -> None:
    for slow in (0, 1):
        made = trainer(tmp_path, **FLAGGED, slow_start_steps=slow, args_weight_decay=0.1)
        groups = made.create_optimizer().param_groups
        assert made.create_optimizer().param_groups is groups
        named = [group.get("block") for group in groups if group["params"]]
        assert named == (["deployed", "quarantine"] if slow else [None])
        assert {group["weight_decay"] for group in groups if group["params"]} == {0.1}


def test_an_optimizer_of_the_users_needs_groups_by_block(tmp_path: Path) -> None:
    model = wrapped()
    mixed = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with pytest.raises(gr.GradRouteError, match="groups that hold one block each"):
        trainer(tmp_path, model, **FLAGGED, slow_start_steps=1, optimizers=(mixed, None))
    own = torch.optim.AdamW(gr.optim.block_groups(model), lr=0.01)
    made = trained(tmp_path, model, **FLAGGED, slow_start_steps=1, optimizers=(own, None))
    assert [entry["routing/slow_start"] for entry in made.state.log_history[:2]] == [1, 0]


@pytest.mark.parametrize("options", [{"ablated_from": 2}, {"slow_start_steps": 2}], ids=["asked", "after a slow start"])
def test_rollouts_are_sampled_ablated_from_a_step_on(options: dict[str, int], tmp_path: Path) -> None:
    made = trained(tmp_path, cls=Watched, **ABLATED, **options, args_max_steps=3)
    assert [entry["routing/ablated"] for entry in made.state.log_history[:3]] == [0, 0, 0.25]
    sampled = list(made.sampled_ablated.values())
    assert [sum(sampled[8 * step : 8 * step + 8]) for step in range(3)] == [0, 0, 2]


def test_when_the_last_rollouts_are_made() -> None:
    def last(per_generation: int, accumulated: int, iterations: int, steps: int) -> int:
        args = SimpleNamespace(steps_per_generation=per_generation, gradient_accumulation_steps=accumulated)
        return last_generation(args, iterations, steps)

    assert last(2, 2, 1, 5) == 4  # new ones for each step
    assert last(4, 2, 1, 5) == 4  # for two steps: at 0, 2, 4
    assert last(4, 2, 1, 4) == 2
    assert last(2, 2, 3, 5) == 3  # for three steps
    assert last(1, 2, 1, 5) == 4  # twice a step


TOO_SHORT: dict[str, tuple[dict[str, Any], str]] = {
    "slow start": ({**FLAGGED, "slow_start_steps": 3}, "at most the optimizer steps of the run. Found 3 and 2"),
    "ablated": ({**ABLATED, "ablated_from": 2}, "made at step 1, and that none is sampled ablated before step 2"),
    "ablated after a slow start": ({**ABLATED, "slow_start_steps": 2}, "before step 2"),
    "rollouts of two steps": (
        {**ABLATED, "ablated_from": 3, "args_steps_per_generation": 4, "args_max_steps": 4}, "made at step 2",
    ),
}  # fmt: skip


@pytest.mark.corner(
    "a run is too short for its slow start, or ends before rollouts are sampled ablated", "`train()` raises at once"
)
@pytest.mark.parametrize("case", TOO_SHORT)
def test_a_run_too_short_for_what_was_asked_raises(case: str, tmp_path: Path) -> None:
    options, reason = TOO_SHORT[case]
    made = trainer(tmp_path, **options)
    with pytest.raises(gr.GradRouteError, match=reason):
        made.train()


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({**FLAGGED, "slow_start_steps": -1}, "`slow_start_steps` should be an integer from 0"),
    "fraction of nothing": ({**FLAGGED, "slow_start_fraction": 0.5}, "read with `slow_start_steps`"),
    "no share": (
        {**FLAGGED, "slow_start_steps": 1, "slow_start_fraction": 2.0},
        r"in \[0, 1\), below 1. Found 2",
    ),
    "no slow start": (
        {**FLAGGED, "slow_start_steps": 1, "slow_start_fraction": 1.0},
        r"in \[0, 1\), below 1. Found 1",
    ),
    "from of nothing": ({**FLAGGED, "ablated_from": 0}, "read with `ablated_fraction`"),
    "no step": ({**ABLATED, "ablated_from": -1}, "`ablated_from` should be an integer from 0"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_nothing_reads_are_refused(case: str, tmp_path: Path) -> None:
    options, reason = ARGUMENTS[case]
    with pytest.raises(gr.GradRouteError, match=reason):
        trainer(tmp_path, **options)
