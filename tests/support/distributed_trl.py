"""Optimizer steps of TRL on two processes over gloo; what each process saw goes into a file per case and rank."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gradroute as gr
from support.processes import leave
from support.trl_runs import Watched, extract, flags, move_reference, reward, trainer

RANK = int(os.environ.get("RANK", "0"))
STILL = {"args_loss_type": "dr_grpo", "args_learning_rate": 0.0, "args_max_grad_norm": 0.0}


def best(*per_rank: int) -> Callable[..., list[bool]]:
    """A detector that flags the completions with the highest rewards, so many on each rank."""

    def detector(completions: list[str], **_: Any) -> list[bool]:
        rewards = reward(completions)
        least = sorted(rewards, reverse=True)[: per_rank[RANK]][-1] if per_rank[RANK] else float("inf")
        return [each >= least for each in rewards]

    return detector


CASES: dict[str, dict[str, Any]] = {
    # A group of four on two processes.
    "shared group": {
        "detector": flags, "detector_recall": 1.0, "directions": extract, "refresher": 1, "ablated_fraction": 0.25,
        "args_beta": 0.2, "args_max_steps": 1, "args_per_device_train_batch_size": 2,
        "args_gradient_accumulation_steps": 1,
    },
    # The same, routed by what the quarantine explains.
    "log ratios": {
        "log_ratio_gate": gr.LogRatioGate(0.3), "ablated_fraction": 0.25, "args_max_steps": 1,
        "args_per_device_train_batch_size": 2, "args_gradient_accumulation_steps": 1,
    },
    # Three rows of one process and two of the other train on two advantages.
    "three and two": {
        "detector": best(1, 2), "args_beta": 0.2, "args_max_steps": 1, "args_gradient_accumulation_steps": 1,
    },
    # Some rows of one process and none of the other; the second step is the second iteration of the same rollouts.
    "some and none": {
        "detector": best(1, 0), "args_num_iterations": 2, "args_max_steps": 2, "args_gradient_accumulation_steps": 1,
    },
}  # fmt: skip


def run(case: str, folder: Path) -> None:
    made = trainer(folder / case, cls=Watched, **STILL, **CASES[case])
    assert made.accelerator.num_processes == 2
    if "args_beta" in CASES[case]:
        move_reference(made.model)
    made.train()
    refresher = made.routing.refresher
    found = {
        "sampled_ablated": made.sampled_ablated, "prompts": made.prompts, "routed": made.routed,
        "steps": [batches[0] for batches in made.micro_batches], "gradients": made.stepped,
        "log": made.state.log_history[0],
        "refreshes": 0 if refresher is None else len(refresher.reports),
    }  # fmt: skip
    torch.save(found, folder / f"{case} {RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[2:]:
        run(name, Path(sys.argv[1]))
    leave()
