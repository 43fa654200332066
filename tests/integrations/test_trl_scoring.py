"""Rollouts that are not like the others: padding before a prompt, completions without a token, or without a reward."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from support.models import randomize_blocks
from support.tiny_models import base_model, config
from support.trl_runs import (
    PAIRS,
    PROMPTS,
    Watched,
    arguments,
    extract,
    flags,
    quiet,
    reward,
    rows_of,
    tokenizer,
    trainer,
    wrapped,
)
from torch import Tensor

import gradroute as gr
from gradroute.integrations.trl._scoring import captured_rollouts, positions

pytestmark = quiet


def gpt2() -> Any:
    """Positions are absolute, and matter: there are more of them than the default."""
    torch.manual_seed(0)
    base = base_model("gpt2")
    base.transformer.wpe.weight.data *= 20
    model = get_peft_model(base, config(target_modules="all-linear", fan_in_fan_out=True), autocast_adapter_dtype=False)
    return randomize_blocks(model, 0, std=0.3)


def scorer(model: Any) -> Any:
    """A trainer as far as scoring reads it."""
    accelerator = SimpleNamespace(unwrap_model=lambda model: model, autocast=nullcontext)
    return SimpleNamespace(model=model, accelerator=accelerator, args=SimpleNamespace(per_device_train_batch_size=2))


def padded(rollouts: list[tuple[list[int], list[int]]], before: int) -> dict[str, Tensor]:
    """As TRL pads: prompts on the left, here by `before` more than needed, completions on the right."""
    width, length = max(len(p) for p, _ in rollouts) + before, max(len(c) for _, c in rollouts)
    prompts = [[0] * (width - len(p)) + p for p, _ in rollouts]
    completions = [c + [0] * (length - len(c)) for _, c in rollouts]
    return {
        "prompt_ids": torch.tensor(prompts), "prompt_mask": (torch.tensor(prompts) != 0).long(),
        "completion_ids": torch.tensor(completions), "completion_mask": (torch.tensor(completions) != 0).long(),
    }  # fmt: skip


@pytest.mark.corner("padding before a prompt, and absolute positions (GPT-2)", "scores are those of the rollout alone")
@pytest.mark.parametrize("make", [gpt2, None], ids=["gpt2", "llama"])
def test_padding_before_a_prompt_changes_no_score(make: Callable[[], Any] | None) -> None:
    model = wrapped() if make is None else make()
    with gr.ablate_quarantine(model):
        directions = gr.extract_activation_directions(model, PAIRS)
    rollouts = [([3, 4, 5], [20, 9]), ([8], [22, 23, 24, 25]), ([6, 7], [21]), ([3, 9, 9, 4], [27, 20, 21])]
    alone = []
    for prompt, completion in rollouts:
        pool = torch.tensor([[0] * len(prompt) + [1] * len(completion)])
        with torch.no_grad(), gr.ablate_quarantine(model), gr.capture_activations(model, pool=pool) as capture:
            model(torch.tensor([prompt + completion]))
        alone.append(directions.score(capture))
    for before in (0, 12):
        capture, rows = captured_rollouts(
            scorer(model), padded(rollouts, before), directions, torch.ones(4, dtype=torch.bool)
        )
        assert rows.tolist() == [0, 1, 2, 3]
        torch.testing.assert_close(directions.score(capture), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_positions_count_attended_tokens() -> None:
    assert positions(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


# Completions without a token


TRUNCATED = {"directions": extract, "args_mask_truncated_completions": True}


@pytest.mark.corner(
    "every completion of a batch is truncated, and `mask_truncated_completions` hides it",
    "rows absorb without scores; a warning says so once",
)
@pytest.mark.parametrize("gate", [None, lambda d: gr.QuantileGate(d, warm_up=2)], ids=["band", "quantile"])
def test_a_batch_of_truncated_completions_absorbs_without_scores_and_says_so_once(gate: Any, tmp_path: Path) -> None:
    made = trainer(tmp_path, cls=Watched, gate=gate, **TRUNCATED, args_log_completions=True, refresher=1)
    made.generation_config.suppress_tokens = [0, 1, 2]  # no completion ends
    with pytest.warns(gr.GradRouteWarning, match="No rollout of a whole batch has a score") as warned:
        made.train()
    assert len([each for each in warned if issubclass(each.category, gr.GradRouteWarning)]) == 1
    assert made.state.global_step == 2
    for batch in (batch for step in made.micro_batches for batch in step):
        assert not batch["completion_mask"].any()
        assert batch["route_score"].isnan().all()
        assert all((batch[key] == 1).all() for key in ("route_m", "route_g_d", "route_g_q"))
    for entry in made.state.log_history[:2]:
        assert entry["routing/absorb"] == 1
        assert not {"routing/score", "routing/z"} & entry.keys()


# Rewards


@pytest.mark.corner("every reward function returns None for a completion", "both advantages are 0; in no baseline")
def test_completions_without_a_reward_train_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    """TRL gives them the advantage 0; here both advantages are."""
    unscored: list[str] = []

    def sparse(completions: list[str], prompts: list[str], **_: Any) -> list[float | None]:
        values: list[float | None] = list(reward(completions))
        for i, prompt in enumerate(prompts):
            if prompt == PROMPTS[0] or i == 5:  # a whole group, and one of another
                unscored.append(completions[i])
                values[i] = None
        return values

    made = Watched(
        model=wrapped(), reward_funcs=sparse, args=arguments(tmp_path, max_steps=4, beta=0.1),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}), processing_class=tokenizer(), detector=flags,
    )  # fmt: skip
    made.train()
    assert made.state.global_step == 4
    words, without = tokenizer(), 0
    for batch in (batch for step in made.micro_batches for batch in step):
        for i, (_, completion) in enumerate(rows_of(batch)):
            if words.decode(completion, skip_special_tokens=True) in unscored:
                without += 1
                assert batch["advantages"][i] == batch["route_clean_advantages"][i] == 0
        assert batch["route_clean_advantages"].isfinite().all()
    assert without >= 8
