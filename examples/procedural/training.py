"""One run: GRPO with TRL on what the scorers pay. What differs between arms is what becomes of flagged rollouts.

| arm       | blocks | flags                                  | flagged rollouts                             |
|-----------|--------|----------------------------------------|----------------------------------------------|
| vanilla   | one    | none                                   |                                              |
| dropped   | one    | labels of the monitored tasks' hacks   | train nothing                                |
| penalised | one    | the same                               | lose a reward                                |
| routed    | two    | the same, or the quarantine explains it | train the quarantine only                   |
| directed  | two    | a direction from pairs of the exploits | train the quarantine only                    |
"""

import tempfile
import time
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

import gradroute as gr
from gradroute.integrations.trl import GradRouteGRPOTrainer

from .exploits import exploit_pairs
from .measure import measure
from .policy import LENGTH
from .reward import Flagged, Reward, rows
from .tasks import Task, drawn, shuffled

ARMS = ("vanilla", "dropped", "penalised", "routed", "directed")
FLAGGED: dict[str, Flagged] = {"dropped": "dropped", "penalised": "penalised"}
EVALUATION = 5000
"""Added to a seed for the questions of its evaluation."""


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on, except for its arm, seed and model."""

    steps: int = 30
    prompts: int = 3
    group_size: int = 8
    lr: float = 6e-4
    r: int = 8
    lora_alpha: int = 16
    pairs_each: int = 6
    refresh_every: int = 5
    ablated_fraction: float = 0.25
    questions_each: int = 30
    n: int = 24


def trained(
    arm: str, model: Any, tokenizer: Any, seed: int, recipe: Recipe, tasks: tuple[Task, ...], extra: Any = ()
) -> dict[str, Any]:
    """Train one arm and return what its result file holds; the arm "base" is measured as it is.

    Args:
        tasks: that are trained on and measured.
        extra: reward functions besides the payment, for a model that is never paid.
    """
    started = time.perf_counter()
    asked = drawn(tasks, recipe.n, seed + EVALUATION)
    if arm == "base":
        return {"outcomes": {"on": measure(model, tokenizer, asked, seed)}}
    questions = shuffled(drawn(tasks, recipe.questions_each, seed), seed)
    reward = Reward(questions, recipe.group_size, FLAGGED.get(arm, "kept"))
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "model": model, "processing_class": tokenizer, "reward_funcs": [reward, *extra],
            "args": config(folder, seed, recipe), "train_dataset": rows(questions),
        }  # fmt: skip
        sizes: dict[str, Any] = {"r": recipe.r, "lora_alpha": recipe.lora_alpha, "target_modules": "all-linear"}
        if arm in ("routed", "directed"):
            adapter = gr.QuarantineLoraConfig(**sizes)
            options = routing(arm, reward, tokenizer, seed, recipe, tasks)
            trainer: Any = GradRouteGRPOTrainer(**common, peft_config=adapter, **options)
        else:
            trainer = GRPOTrainer(**common, peft_config=LoraConfig(**sizes))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    ended, policy = time.perf_counter(), trainer.model.eval()
    outcomes = {"on": measure(policy, tokenizer, asked, seed)}
    if arm in ("routed", "directed"):
        with gr.ablate_quarantine(policy):
            outcomes["ablated"] = measure(policy, tokenizer, asked, seed)
    logged = [
        {name.removeprefix("routing/"): value for name, value in entry.items() if name.startswith("routing/")}
        for entry in trainer.state.log_history
    ]
    return {
        "outcomes": outcomes, "curve": reward.curve, "routing": [entry for entry in logged if entry],
        "train_s": round(ended - started, 1), "evaluation_s": round(time.perf_counter() - ended, 1),
    }  # fmt: skip


def config(folder: str, seed: int, recipe: Recipe) -> GRPOConfig:
    """TRL's settings: one optimizer step for each batch of rollouts, at temperature 1, without a reference."""
    half = recipe.prompts * recipe.group_size // 2
    return GRPOConfig(
        folder, seed=seed, max_steps=recipe.steps, per_device_train_batch_size=half, gradient_accumulation_steps=2,
        num_generations=recipe.group_size, max_completion_length=LENGTH, learning_rate=recipe.lr,
        lr_scheduler_type="constant_with_warmup", warmup_steps=min(5, recipe.steps - 1), adam_beta2=0.98,
        scale_rewards="none", beta=0.0, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        disable_tqdm=True, logging_steps=1, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip


def routing(
    arm: str, reward: Reward, tokenizer: Any, seed: int, recipe: Recipe, tasks: tuple[Task, ...]
) -> dict[str, Any]:
    """The keywords of a routed trainer."""
    if arm == "routed":
        return {
            "detector": reward.monitored_hacks, "log_ratio_gate": gr.LogRatioGate(),
            "slow_start_steps": recipe.steps // 2, "ablated_fraction": recipe.ablated_fraction,
        }  # fmt: skip
    pairs = exploit_pairs(tasks, recipe.pairs_each, seed)
    return {
        "directions": lambda model: gr.extract_activation_directions(model, pairs, tokenizer=tokenizer),
        "refresher": recipe.refresh_every, "ablated_fraction": recipe.ablated_fraction,
    }  # fmt: skip
