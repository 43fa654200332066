"""Around the loss: old log-probabilities, the reference, scores, filters and refreshes, each when it should be."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import randomize_blocks
from support.tiny_models import base_model, config
from support.trl_runs import PAIRS, Watched, extract, flags, logps, quiet, rows_of, trained, trainer, wrapped
from transformers import TrainerCallback
from trl import GRPOTrainer

import gradroute as gr
from gradroute.integrations.trl import GradRouteGRPOTrainer, Routing
from gradroute.integrations.trl._schedule import Schedule

pytestmark = quiet
SEVERAL_STEPS = {"args_steps_per_generation": 4}


def off_by(made: Watched, step: int = 0) -> dict[bool, float]:
    """By whether they were sampled ablated: how far old log-probabilities are from those of the sampling state."""
    largest = {False: 0.0, True: 0.0}
    for batch in made.micro_batches[step]:
        for i, (prompt, completion) in enumerate(rows_of(batch)):
            ablated = made.sampled_ablated[prompt + completion]
            with torch.no_grad(), gr.ablate_quarantine(made.model) if ablated else nullcontext():
                expected = logps(made.model, prompt, completion)
            found = batch["old_per_token_logps"][i, : len(completion)]
            largest[ablated] = max(largest[ablated], float((found - expected).abs().max()))
    return largest


def test_old_log_probabilities_are_of_the_state_that_each_row_was_sampled_in(tmp_path: Path) -> None:
    class OneState(Watched):
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            return GRPOTrainer._get_per_token_logps_and_entropies(self, *args, **kwargs)

    still = {"args_learning_rate": 0.0, "args_max_steps": 2, **SEVERAL_STEPS}
    wrong, right = (
        trained(tmp_path, cls=cls, detector=flags, detector_recall=1.0, ablated_fraction=0.25, **still)
        for cls in (OneState, Watched)
    )
    assert off_by(wrong)[True] > 0.1
    assert max(off_by(right).values()) < 1e-5
    assert max(off_by(right, step=1).values()) < 1e-5


def test_rows_that_are_trained_in_another_state_than_sampled_get_old_log_probabilities(tmp_path: Path) -> None:
    """TRL takes them from the loss's own forward when steps are aligned, which would hide that these are off policy."""
    runs = {}
    for below in ("absorb", "keep"):
        runs[below] = trained(
            tmp_path, cls=Watched, detector=flags, gate=gr.LabelGate(below=below), args_max_steps=1,
            args_learning_rate=0.0,
        )  # fmt: skip
    assert all("old_per_token_logps" not in batch for batch in runs["absorb"].micro_batches[0])
    assert max(off_by(runs["keep"]).values()) < 1e-5
    batch = runs["keep"].micro_batches[0][0]
    kept = [i for i in range(4) if batch["route_m"][i] == 0]
    prompt, completion = rows_of(batch)[kept[0]]
    with torch.no_grad(), gr.ablate_quarantine(runs["keep"].model):
        in_training = logps(runs["keep"].model, prompt, completion)
    assert (in_training - batch["old_per_token_logps"][kept[0], : len(completion)]).abs().max() > 0.1


@pytest.mark.parametrize("made_by", ["peft_config", "wrapped model"])
def test_a_reference_pass_leaves_both_blocks_training(made_by: str, tmp_path: Path) -> None:
    frozen_in_between: list[bool] = []

    class Looks(GradRouteGRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
            if self._sampled_ablated is not None:
                blocks = [p for n, p in self.model.named_parameters() if ".default." in n]
                frozen_in_between.append(not any(p.requires_grad for p in blocks))
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    if made_by == "peft_config":
        torch.manual_seed(0)
        model, options = base_model("llama"), {"peft_config": config()}
    else:
        model, options = wrapped(), {}
    made = trainer(tmp_path, model, cls=Looks, detector=flags, args_beta=0.1, **options)
    if made_by == "peft_config":
        randomize_blocks(made.model, 0, std=0.3)
    start = {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}
    reference = {name for name in start if ".ref." in name}
    for name in reference:
        assert torch.equal(start[name], start[name.replace(".ref.", ".default.")])
    assert len([name for name in reference if "quarantine" in name]) == (0 if made_by == "peft_config" else 28)
    made.train()
    assert frozen_in_between == [True, True]  # steps are aligned: the only passes are the reference's
    blocks = {n for n, _ in [*gr.deployed_parameters(made.model), *gr.quarantine_parameters(made.model)]}
    assert all(p.requires_grad == (name in blocks) for name, p in made.model.named_parameters())
    moved = {name for name, p in made.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == blocks
    figures = made.state.log_history[0]
    assert figures["kl"] > 1e-3 if made_by == "peft_config" else figures["kl"] == 0  # a copy of both blocks


class BeforeStep(TrainerCallback):
    """What the optimizer is about to step along: its hack-ward share, and the norm."""

    def __init__(self, directions: gr.Directions) -> None:
        self.directions, self.cin, self.norms = directions, [], []

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        self.cin.append(gr.apply_filter(model, gr.ProjectionFilter(self.directions, mode="measure")).cin)
        self.norms.append(float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()))


@pytest.mark.slow
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
def test_a_filter_runs_once_per_step_after_the_last_micro_batch_and_before_clipping(
    max_grad_norm: float, tmp_path: Path
) -> None:
    model = wrapped()
    directions = gr.extract_gradient_directions(model, PAIRS, features="parameter")
    runs = {}
    for mode in ("measure", "erase"):
        look = BeforeStep(directions)
        made = trainer(
            tmp_path, wrapped(), grad_filter=gr.ProjectionFilter(directions, mode=mode), callbacks=[look],
            args_max_grad_norm=max_grad_norm,
        )  # fmt: skip
        made.train()
        runs[mode] = look
        logged = [entry for entry in made.state.log_history if "routing/filter_cin" in entry]
        assert len(logged) == 2
        assert [entry["routing/filter_cout"] for entry in logged] == pytest.approx(look.cin, abs=1e-5)
    assert runs["measure"].cin[0] > 0.01
    assert max(runs["erase"].cin) < 1e-4
    if max_grad_norm:  # of what the filter has left
        assert runs["erase"].norms == pytest.approx([0.01, 0.01], rel=1e-3)
    else:
        assert min(runs["erase"].norms) > 0.02


@pytest.mark.slow
def test_a_filter_of_rollouts_sees_every_micro_batch_also_under_checkpointing(tmp_path: Path) -> None:
    model = wrapped()
    directions = gr.extract_gradient_directions(model, PAIRS, features="parameter")
    steps = []
    for recompute in (False, True):
        keep_all, drop_all = (
            trained(
                tmp_path, wrapped(), cls=Watched, grad_filter=gr.RolloutFilter(directions, threshold),
                args_max_steps=1, args_gradient_checkpointing=recompute,
            )
            for threshold in (2.0, -2.0)
        )  # fmt: skip
        assert all(gradient.abs().max() < 1e-6 for gradient in drop_all.stepped[0]["deployed"].values())
        assert all(gradient.abs().max() > 1e-4 for gradient in keep_all.stepped[0]["deployed"].values())
        for block in ("quarantine",):
            for name, gradient in keep_all.stepped[0][block].items():
                torch.testing.assert_close(drop_all.stepped[0][block][name], gradient)
        steps.append(keep_all.stepped[0])
    for name, gradient in steps[0]["deployed"].items():
        torch.testing.assert_close(steps[1]["deployed"][name], gradient)


def test_directions_are_refreshed_by_optimizer_steps_and_not_by_micro_batches(tmp_path: Path) -> None:
    made = trained(tmp_path, directions=extract, refresher=2, args_max_steps=4)
    assert [report.step for report in made.routing.refresher.reports] == [2, 4]
    assert made.routing.directions.version == 2
    ages = [entry["routing/directions_age"] for entry in made.state.log_history if "routing/directions_age" in entry]
    assert ages == [1, 0, 1, 0]
    name = "routing/directions_overlap"
    overlaps = [entry[name] for entry in made.state.log_history if name in entry]
    assert overlaps == [report.overlap for report in made.routing.refresher.reports]
    assert overlaps[0] < 1


def test_a_refresher_that_would_not_come_due_raises(tmp_path: Path) -> None:
    with pytest.raises(gr.errors.RefreshError, match="in the 2 optimizer steps of this run"):
        trainer(tmp_path, directions=extract, refresher=3).train()


def test_a_step_that_the_refresher_does_not_see_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, directions=extract, refresher=1)
    monkeypatch.setattr(Schedule, "on_step_end", lambda *_, **__: None)
    with pytest.raises(gr.errors.RefreshError, match="called once after each optimizer step"):
        made.train()


def test_blocks_without_rows_can_be_left_out_of_steps(tmp_path: Path) -> None:
    """As docs/trl.md has it: the optimizer is made before the run, and AdamW's decay finds nothing to do."""
    for skips in (False, True):
        made = trainer(
            tmp_path, detector=lambda completions, **_: [True] * len(completions), args_weight_decay=0.1,
        )  # fmt: skip
        if skips:
            handle = gr.skip_idle_blocks(made.model, made.create_optimizer())
        before = {name: p.detach().clone() for name, p in gr.deployed_parameters(made.model)}
        made.train()
        after = dict(gr.deployed_parameters(made.model))
        assert all(torch.equal(after[name], value) for name, value in before.items()) == skips
    assert handle.skipped == {"deployed": 2, "quarantine": 0}


def test_what_the_run_routes_by_is_public_and_makes_a_card(tmp_path: Path) -> None:
    made = trained(tmp_path, directions=extract, refresher=1, detector=flags, args_max_steps=1)
    routing = made.routing
    assert isinstance(routing, Routing)
    assert isinstance(routing.gate, gr.BandGate)
    assert routing.gate.directions is routing.directions is routing.refresher.directions
    assert routing.filter is None
    assert routing.detector is flags

    def evaluate(_: Any) -> list[gr.EvalRecord]:
        return [gr.EvalRecord(mode="m", monitored=True, prompt_id=str(i), hacked=i > 1, solved=i < 3) for i in range(4)]

    card = gr.write_card(
        made.model, gr.evaluate_on_off(made.model, evaluate), tmp_path / "card.md", routed_by=made.routing
    )
    text = card.read_text()
    assert repr(routing.gate) in text
    assert routing.gate.describe() in text
    assert "every 1 step" in text
