"""One optimizer step of TRL on two processes over gloo, groups spread over both; what each saw goes into a file."""

import sys
from pathlib import Path

import torch

from support.trl_runs import Watched, extract, flags, move_reference, trainer

OPTIONS = {
    "detector": flags, "directions": extract, "refresher": 1, "ablated_fraction": 0.25, "args_beta": 0.2,
    "args_loss_type": "dr_grpo", "args_learning_rate": 0.0, "args_max_grad_norm": 0.0, "args_max_steps": 1,
    "args_per_device_train_batch_size": 2, "args_gradient_accumulation_steps": 1, "args_num_generations": 4,
}  # fmt: skip

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    made = trainer(folder / "out", cls=Watched, **OPTIONS)
    assert made.accelerator.num_processes == 2
    move_reference(made.model)
    made.train()
    found = {
        "sampled_ablated": made.sampled_ablated, "batch": made.micro_batches[0][0], "gradients": made.stepped[0],
        "flag_rate": made.state.log_history[0]["routing/flag_rate"], "refreshes": len(made.routing.refresher.reports),
    }  # fmt: skip
    torch.save(found, folder / f"rank{made.args.process_index}.pt")
