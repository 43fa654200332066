"""One of the processes that run verl's FSDP2 engine on a CPU: scores, trains, refreshes, syncs and saves, and writes it.

    python distributed_verl.py folder case ...       with VERL_PLATFORM=cpu, and the process group's environment
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.tiny_models import llama
from support.verl_batches import PAIRS, rollouts, routed_loss
from tensordict import TensorDict

import gradroute as gr
from gradroute.integrations.verl import register

RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

CASES: dict[str, dict[str, Any]] = {
    "padded": {"model_use_remove_padding": False},
    "packed": {},
    "dynamic": {"batch_use_dynamic_bsz": True, "batch_max_token_len_per_gpu": 24},
    "tied": {"folder": "tied"},
}


def engine(model: Path, **options: Any) -> Any:
    """A routed engine on the model and the adapter in a folder."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine import EngineRegistry

    of = lambda part: {key.removeprefix(part): value for key, value in options.items() if key.startswith(part)}  # noqa: E731
    model_config = {
        "path": str(model / "base"), "lora_adapter_path": str(model / "adapter"), "lora_rank": 4, "lora_alpha": 8,
        "load_tokenizer": False, "override_config": {"attn_implementation": "sdpa"}, "lora": {"rank": 7},
    }  # fmt: skip
    engine_config = {
        "strategy": "fsdp2", "use_torch_compile": False, "mixed_precision": {"param_dtype": "fp32"},
    }  # fmt: skip
    made = EngineRegistry.new(
        "language_model", "fsdp2",
        model_config=HFModelConfig(**{**model_config, **of("model_")}),
        engine_config=FSDPEngineConfig(**{**engine_config, **of("engine_")}),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, lr_warmup_steps=0, total_training_steps=10),
        checkpoint_config=CheckpointConfig(),
    )  # fmt: skip
    made.initialize()
    return made


def whole(parameters: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in parameters}


def batch(made: Any, rows: slice, **options: Any) -> TensorDict:
    from verl.utils import tensordict_utils as tu

    data = rollouts(rows)
    settings = {
        "use_remove_padding": made.model_config.use_remove_padding, "use_dynamic_bsz": False,
        "micro_batch_size_per_gpu": 2, "temperature": 1.0,
    }  # fmt: skip
    tu.assign_non_tensor(data, **{**settings, **options})
    return data


def run(case: str, folder: Path) -> None:
    options = dict(CASES[case])
    made = engine(folder / options.pop("folder", "untied"), **options)
    in_batch = {key.removeprefix("batch_"): value for key, value in options.items() if key.startswith("batch_")}
    share = 8 // SIZE
    mine = slice(RANK * share, (RANK + 1) * share)
    found: dict[str, Any] = {"directions": made.directions.rows, "ends": made.gate.ends}

    with made.eval_mode():
        scored = made.infer_batch(batch(made, mine, **in_batch))["model_output"]
        with made.disable_adapter():
            reference = made.infer_batch(batch(made, mine, **in_batch))["model_output"]
    found["columns"] = {name: scored[name].values() for name in scored if name.startswith("gradroute")}
    found["log_probs"], found["reference"] = scored["log_probs"].values(), sorted(reference)

    found["gradients"], found["figures"] = [], []
    step = made.optimizer.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        found["gradients"].append(whole((n, p.grad) for n, p in made.module.named_parameters() if p.grad is not None))
        return step(*args, **kwargs)

    made.optimizer_config.clip_grad  # noqa: B018
    made.optimizer.step = watched
    for _ in range(2):
        data = batch(made, mine, **in_batch)
        for name in scored:
            if name.startswith("gradroute"):
                data[name] = scored[name]
        with made.train_mode():
            found["figures"].append(made.train_batch(data, routed_loss)["metrics"])
    found["refreshed"] = made.directions.rows
    found["reports"] = [(report.step, report.moved) for report in made.refresher.reports]
    params, config = made.get_per_tensor_param(base_sync_done=True)
    found["adapter"], found["config"] = dict(params), {key: config[key] for key in ("r", "lora_alpha")}
    found["weights"] = whole(made.module.named_parameters())
    torch.save(found, folder / f"{case} {SIZE} {RANK}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    register(
        directions=lambda model, tokenizer: gr.extract_activation_directions(model, PAIRS),
        refresh_every=2, r_quarantine=3,
    )  # fmt: skip
    for name in sys.argv[2:]:
        run(name, Path(sys.argv[1]))
    dist.destroy_process_group()
