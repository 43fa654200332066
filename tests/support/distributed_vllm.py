"""Steps of TRL with vLLM in one process of several, or against a server; what each process saw goes into a file.

python distributed_vllm.py FOLDER each | sharded | tensor_parallel | URL
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from gradroute._sharding import is_fully_sharded, whole
from gradroute.integrations.trl import GradRouteGRPOTrainer
from gradroute.integrations.trl._flagging import sampled_ablated
from gradroute.integrations.trl._scoring import logps_of_state
from support import vllm_engine as ve
from support.sharding_shims import fsdp_on_cpu

RANK = int(os.environ.get("RANK", "0"))


class Watched(GradRouteGRPOTrainer):
    """Keeps each batch of rollouts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batches: list[dict[str, Any]] = []

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        rollouts = super()._generate_and_score_completions(inputs)
        rows = len(inputs)
        ablated = sampled_ablated(rows, RANK * rows, self.num_generations, self.routing.ablated_per_group)
        kept = ("old_per_token_logps", "sampling_per_token_logps", "completion_mask", "completion_ids", "prompt_ids")
        batch = {name: rollouts[name] for name in kept}
        self.batches.append({**batch, "ablated": ablated, "other": logps_of_state(self, rollouts, ~ablated)})
        return rollouts


def run(folder: Path, engine: str) -> None:
    options: dict[str, Any] = {"args_max_steps": 2, "args_per_device_train_batch_size": 4}
    if engine == "tensor_parallel":
        options["args_vllm_tensor_parallel_size"] = 2
    elif engine == "sharded":
        fsdp_on_cpu()
    elif engine != "each":
        # Groups of four rows lie on one process; a server is told of all.
        options |= {"args_vllm_mode": "server", "args_vllm_server_base_url": engine, "engine": {"timeout": 60.0}}
    made = ve.trainer(folder, cls=Watched, **options)
    made.train()
    parameters = {name: whole(p).clone() for name, p in made.model.named_parameters() if p.requires_grad}
    assert is_fully_sharded(made.model) == (engine == "sharded")
    torch.save(
        {"batches": made.batches, "parameters": parameters, "log": made.state.log_history}, folder / f"{RANK}.pt"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), sys.argv[2])
