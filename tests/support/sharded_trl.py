"""TRL on two processes whose model FSDP2 or DeepSpeed shards; what each process saw goes into a file per case.

    python sharded_trl.py FOLDER ENGINE CASE...

A step of SGD with a learning rate of one is the gradient, also where the engine hands none out. The shims of
`sharding_shims` make the engines shard on a CPU.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback

import gradroute as gr
from gradroute._sharding import is_split, whole
from support.engine_twin import followed
from support.processes import leave
from support.sharding_shims import deepspeed_on_cpu, fsdp_on_cpu
from support.tiny_models import config
from support.trl_runs import (
    PAIRS,
    PROMPTS,
    Watched,
    extract,
    flags,
    move_reference,
    reward,
    tokenizer,
    trainer,
    wrapped,
)

RANK = int(os.environ.get("RANK", "0"))
ENGINES: dict[str, dict[str, str]] = {
    "FSDP2": {
        "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    },
    "ZeRO-2": {"DS_ACCELERATOR": "cpu"},
    "ZeRO-3": {"DS_ACCELERATOR": "cpu"},
}  # fmt: skip
ONE_STEP = {
    "args_optim": "sgd", "args_learning_rate": 1.0, "args_max_grad_norm": 0.0, "args_loss_type": "dr_grpo",
    "args_max_steps": 1, "args_gradient_accumulation_steps": 1,
}  # fmt: skip


def zero(stage: int) -> dict[str, Any]:
    """DeepSpeed's settings; nothing is so small that it would be kept whole."""
    return {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip


def best(*per_rank: int) -> Callable[..., list[bool]]:
    """A detector that flags the completions with the highest rewards, so many on each rank."""

    def detector(completions: list[str], **_: Any) -> list[bool]:
        rewards = reward(completions)
        least = sorted(rewards, reverse=True)[: per_rank[RANK]][-1] if per_rank[RANK] else float("inf")
        return [each >= least for each in rewards]

    return detector


def parameter_directions(model: nn.Module) -> gr.Directions:
    return gr.extract_gradient_directions(model, PAIRS, features="parameter")


class EndsOnRankOne(Watched):
    """Completions of rank 1 end by themselves; those of rank 0 are all truncated, and masked."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        completions, *rest = super()._generate_single_turn(*args, **kwargs)
        return ([[*ids[:-1], 2] if RANK == 1 else ids for ids in completions], *rest)


# With directions that are made before: the first score is also the first that asks which base model it is.
# TRL's two iterations: scores then come from the pass of old log-probabilities.
READY = {"one rank without tokens": {}, "one rank without tokens, old pass": {"args_num_iterations": 2}}
UNEQUAL = {**ONE_STEP, "detector": best(1, 2), "args_beta": 0.2}
CHECKPOINTS = {
    f"checkpoints, use_reentrant={mode}": {
        **UNEQUAL, "args_gradient_checkpointing": True, "args_gradient_checkpointing_kwargs": {"use_reentrant": mode},
    }
    for mode in (False, True)
}  # fmt: skip
RESUMED = {
    "args_max_steps": 5, "args_num_iterations": 2, "args_save_strategy": "steps", "args_save_steps": 3,
    "args_scale_rewards": "group", "args_per_device_train_batch_size": 2, "refresher": 2, "ablated_fraction": 0.25,
    "directions": extract,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    # A group of four on two processes, with everything that runs the model in a step.
    "routed": {
        **ONE_STEP, "detector": flags, "detector_recall": 1.0, "directions": extract, "refresher": 1,
        "ablated_fraction": 0.25, "args_beta": 0.2, "args_per_device_train_batch_size": 2,
    },
    # One process has more rows that run twice than the other.
    **CHECKPOINTS,
    **{
        name: {
            **ONE_STEP, "cls": EndsOnRankOne, "args_mask_truncated_completions": True, "args_max_steps": 1, **more,
        }
        for name, more in READY.items()
    },
    "by name": {
        **ONE_STEP, "directions": extract, "refresher": 1, "args_gradient_checkpointing": True,
        "args_gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "filter": {
        **ONE_STEP, "directions": parameter_directions,
        "grad_filter": lambda directions: gr.filters.ProjectionFilter(directions, mode="erase", side="two"),
        "ablated_fraction": 0.25,
    },
    "log ratios": {**ONE_STEP, "log_ratio_gate": gr.LogRatioGate(0.3), "ablated_fraction": 0.25},
    "resumed": {
        **RESUMED, "gate": lambda directions: gr.QuantileGate(directions, warm_up=4),
        "log_ratio_gate": gr.LogRatioGate(0.3, below="keep"), "slow_start_steps": 4,
    },
    "resumed, no slow start": {**RESUMED, "detector": flags, "detector_recall": 1.0},
}  # fmt: skip
FSDP2_ONLY = {"filter", "resumed"}


def values(model: nn.Module) -> dict[str, Tensor]:
    """Of both blocks, whole, on every rank."""
    return {
        name: whole(p, name).clone() for name, p in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]
    }


def made(case: str, engine: str, folder: Path, seed: int = 0, **more: Any) -> Any:
    options = {"cls": Watched, **CASES[case], **more}
    if engine.startswith("ZeRO"):
        options |= {"args_deepspeed": zero(int(engine[-1])), "args_use_cpu": False}
    model: Any = wrapped(seed)
    if case in READY:
        with gr.ablate_quarantine(model):
            options["directions"] = extract(model)
    if case == "by name":
        model, options["peft_config"] = str(folder.parent / "base"), config()
    built = trainer(folder, model, **options)
    if "args_beta" in options:
        move_reference(built.model)
    return built


def run(case: str, engine: str, folder: Path) -> None:
    built = made(case, engine, folder / case)
    assert built.accelerator.num_processes == 2
    seen: dict[str, Any] = {}

    class First(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            seen["before"] = values(built.model)
            seen["split"] = is_split(built.model)
            directions = built.routing.directions
            seen["directions"] = {} if directions is None else dict(directions.rows)

    built.add_callback(First())
    built.train()
    routing = built.routing
    found = {
        **seen, "after": values(built.model), "sampled_ablated": dict(built.sampled_ablated),
        "prompts": dict(built.prompts), "routed": dict(built.routed),
        "steps": [batches[0] for batches in built.micro_batches],
        "log": built.state.log_history[0],
        "refreshed": {} if routing.directions is None else dict(routing.directions.rows),
        "refreshes": 0 if routing.refresher is None else len(routing.refresher.reports),
    }  # fmt: skip
    if case == "routed":
        gr.export_deployed(built.model, folder / "deployed")
        gr.export_full(built.model, folder / "full")
        found["evaluated"] = built.evaluate(Dataset.from_dict({"prompt": PROMPTS}))
        found["followed"] = followed(built.model, wrapped())
    torch.save(found, folder / f"{case} {RANK}.pt")


def run_resumed(case: str, engine: str, folder: Path) -> None:
    """The same run without an interruption, and from its checkpoint by a trainer that began with other weights."""
    both = []
    for resumes in (False, True):
        built = made(case, engine, folder / case / ("rest" if resumes else "whole"), seed=7 if resumes else 0)
        built.train(resume_from_checkpoint=str(folder / case / "whole" / "checkpoint-3") if resumes else None)
        reports = [repr(report) for report in built.routing.refresher.reports]
        both.append({
            "values": values(built.model), "rows": dict(built.routing.directions.rows), "reports": reports,
            "batches": built.micro_batches[0 if resumes else 3 :], "log": built.state.log_history[:5],
        })  # fmt: skip
    torch.save(both, folder / f"{case} {RANK}.pt")


def main(folder: Path, engine: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    (fsdp_on_cpu if engine == "FSDP2" else deepspeed_on_cpu)()
    if "by name" in cases and RANK == 0:
        base = wrapped().unload()
        base.save_pretrained(folder / "base.part")
        tokenizer().save_pretrained(folder / "base.part")
        (folder / "base.part").rename(folder / "base")
    for case in cases:
        (run_resumed if case.startswith("resumed") else run)(case, engine, folder)
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
