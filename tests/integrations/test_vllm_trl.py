"""TRL with vLLM: each row is sampled and scored in its own view, over steps, evaluations and a resumed run."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: .ci/vllm")

import torch
from support import vllm_engine as ve
from trl.trainer import grpo_trainer

import gradroute as gr
from gradroute.integrations.trl import GradRouteGRPOTrainer, GradRouteMixin
from gradroute.integrations.trl._scoring import logps_of_state


class Watched(GradRouteGRPOTrainer):
    """Keeps each batch of rollouts, with log-probabilities of all rows in the view in which they were not sampled."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Any]] = []
        self.asked: list[list[bool]] = []
        requests = self.vllm_generation.views.requests

        def watched(rows: int, **options: Any) -> Any:
            made = requests(rows, **options)
            self.asked.append(["ablated" in each.lora_name for each in made])
            return made

        self.vllm_generation.views.requests = watched

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        rollouts = super()._generate_and_score_completions(inputs)
        asked = torch.tensor(self.asked[-1])
        other = None
        if self.model.training:
            other = logps_of_state(self, rollouts, ~asked)
        self.batches.append({**rollouts, "asked": asked, "other": other})
        return rollouts


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = ve.trainer(tmp_path_factory.mktemp("run"), cls=Watched, args_max_steps=4)
    made.train()
    return made


def difference(batch: dict[str, Any], logps: Any) -> torch.Tensor:
    """Largest |log p - log p of the engine| of each row."""
    return ((logps - batch["sampling_per_token_logps"]).abs() * batch["completion_mask"]).amax(1)


def test_every_row_is_sampled_and_scored_in_its_own_view(trained: Any) -> None:
    assert len(trained.batches) == 4
    for step, batch in enumerate(trained.batches):
        assert batch["asked"].tolist() == [True, True, False, False] * 2
        assert difference(batch, batch["old_per_token_logps"]).max() < 1e-4
        # Before the first step both views are one model.
        assert (difference(batch, batch["other"]).min() > 0.1) == (step > 0)
        torch.testing.assert_close(
            batch["importance_sampling_ratio"], torch.ones_like(batch["importance_sampling_ratio"]), atol=1e-3, rtol=0
        )


def test_the_log_shows_the_difference_in_each_view(trained: Any) -> None:
    steps = [entry for entry in trained.state.log_history if "loss" in entry]
    for entry, batch in zip(steps, trained.batches, strict=True):
        found = (batch["old_per_token_logps"] - batch["sampling_per_token_logps"]).abs()
        mask, off = batch["completion_mask"].bool(), batch["asked"]
        for view, rows in (("on", ~off), ("ablated", off)):
            mean = float(found[rows][mask[rows]].mean())
            assert float(entry[f"sampling/logp_difference_{view}"]) == pytest.approx(mean, rel=1e-3)
            assert mean < 1e-4


def test_an_evaluation_is_sampled_in_its_view(trained: Any) -> None:
    trained.asked.clear()
    metrics = trained.evaluate()
    seen = [row for batch in trained.asked for row in batch]
    half = len(seen) // 2
    assert half > 0
    assert seen == [False] * half + [True] * half
    assert metrics["eval_on_sampling/logp_difference_on"] < 1e-4
    assert metrics["eval_ablated_sampling/logp_difference_ablated"] < 1e-4
    assert "eval_on_sampling/logp_difference_ablated" not in metrics


def test_weights_that_change_without_a_step_reach_the_engine(trained: Any) -> None:
    def greedy(_: Any) -> Any:
        return trained.vllm_generation._sampled([[1, 5, 6, 7]] * 2)[1]

    with trained.vllm_generation._plain_sampling():
        assert gr.evaluation.assert_ablation_reaches(trained.model, greedy) == 1
        views = trained.vllm_generation.views
        ve.randomized(trained.model, 7)
        assert not views.is_current
        trained.vllm_generation.generate([[1, 5, 6, 7]], None, 1)
        assert views.is_current


def test_the_check_runs_before_the_first_rollout_and_changes_no_rollout(tmp_path: Path) -> None:
    calls: list[str] = []
    made = {}
    for check in (0.05, False):
        one = ve.trainer(tmp_path / str(check), cls=Watched, args_max_steps=2, engine_check=check)
        sampled = one.vllm_generation._sampled
        one.vllm_generation._sampled = lambda prompts, sampled=sampled: (calls.append("check"), sampled(prompts))[1]
        one.train()
        made[check] = [batch["completion_ids"] for batch in one.batches]
        assert len(calls) == 5
        # The engine's own calls of the check are not among the rollouts'.
        assert one.asked[-1] == [True, True, False, False] * 2
    assert all(torch.equal(a, b) for a, b in zip(made[0.05], made[False], strict=True))


def test_an_engine_that_does_not_follow_ends_the_run_before_a_rollout(tmp_path: Path) -> None:
    made = ve.trainer(tmp_path, cls=Watched)
    views = made.vllm_generation.views
    views.requests = lambda rows, **_: [views.held["on"]] * rows
    with pytest.raises(gr.GradRouteError, match="fit the other view"):
        made.train()
    assert made.batches == []
    assert made.state.global_step == 0


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    options: dict[str, Any] = {"cls": Watched, "args_save_strategy": "steps", "args_save_steps": 2, "args_max_steps": 4}
    whole = ve.trainer(tmp_path, **options)
    whole.train()
    rest = ve.trainer(tmp_path, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(rest.batches) == 2
    for a, b in zip(whole.batches[2:], rest.batches, strict=True):
        assert torch.equal(a["completion_ids"], b["completion_ids"])
        assert torch.equal(a["sampling_per_token_logps"], b["sampling_per_token_logps"])
    for (name, p), (_, q) in zip(whole.model.named_parameters(), rest.model.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_without_the_correction_nothing_is_compared_and_the_run_is_the_same_policy(tmp_path: Path) -> None:
    made = ve.trainer(tmp_path, cls=Watched, args_max_steps=2, args_vllm_importance_sampling_correction=False)
    made.train()
    assert made.batches[0]["asked"].tolist() == [True, True, False, False] * 2
    assert not any("logp_difference" in name for entry in made.state.log_history for name in entry)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "sleep": ({"args_vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode=True.*Fix"),
    "length": ({"engine": {"max_model_len": 64}}, "max_model_len.*vllm_max_model_length"),
    "lora": ({"engine": {"enable_lora": False}}, "enable_lora.*leave it out"),
    "key": ({"args_vllm_mode": "server", "engine": {"api_key": "x"}}, "Found api_key"),
    "rank": ({"engine": {**ve.OPTIONS, "max_lora_rank": 1}}, "max_lora_rank of 7 at least. Found 1"),
    "one adapter": ({"engine": {**ve.OPTIONS, "max_loras": 1}}, "max_loras of 2 at least. Found 1"),
    "without vLLM": ({"args_use_vllm": False}, "`engine` is read with use_vllm=True"),
    "whole modules": (
        {"peft_config": gr.QuarantineLoraConfig(r=2, r_quarantine=2, modules_to_save=["lm_head"])}, "modules_to_save",
    ),
    "server": ({"args_vllm_mode": "server", "engine": {"dtype": "float32"}}, "Found dtype.*server is started"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_no_engine_reads_are_refused(case: str, tmp_path: Path) -> None:
    options, message = OPTIONS[case]
    with pytest.raises(gr.GradRouteError, match=message):
        ve.trainer(tmp_path, **options)


def test_a_backend_of_another_kind_is_found(tmp_path: Path) -> None:
    backend = grpo_trainer.VLLMGeneration

    class Replacing(grpo_trainer.GRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.vllm_generation = backend.__new__(backend)

    class Mine(GradRouteMixin, Replacing):
        pass

    with pytest.raises(gr.GradRouteError, match="gradroute's vLLM backend. Found VLLMGeneration"):
        ve.trainer(tmp_path, cls=Mine)
