"""One of the processes that run verl's FSDP2 engine on a CPU: scores, trains, refreshes, syncs, saves.

python distributed_verl.py folder case ...       with VERL_PLATFORM=cpu, and the process group's environment
"""

import copy
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict

import gradroute as gr
from gradroute.integrations.verl import register
from support.processes import leave
from support.verl_batches import PAIRS, rollouts, routed_loss

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
        "language_model", options.get("engine_strategy", "fsdp2"),
        model_config=HFModelConfig(**{**model_config, **of("model_")}),
        engine_config=FSDPEngineConfig(**{**engine_config, **of("engine_")}),
        optimizer_config=FSDPOptimizerConfig(lr=1e-2, lr_warmup_steps=0, total_training_steps=10, clip_grad=1e9),
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


def share(made: Any, **options: Any) -> TensorDict:
    """This process's part of the rollouts."""
    size = 8 // SIZE
    return batch(made, slice(RANK * size, (RANK + 1) * size), **options)


def routed_share(made: Any, scored: Any, **options: Any) -> TensorDict:
    """`share` with the columns that a log-prob pass found."""
    data = share(made, **options)
    for name in scored:
        if name.startswith("gradroute"):
            data[name] = scored[name]
    return data


def step(made: Any, scored: Any, **options: Any) -> dict[str, Any]:
    data = routed_share(made, scored, **options)
    with made.train_mode():
        return made.train_batch(data, routed_loss)["metrics"]


def score(made: Any, **options: Any) -> Any:
    with made.eval_mode():
        return made.infer_batch(share(made, **options))["model_output"]


def run(case: str, folder: Path) -> None:
    options = dict(CASES[case])
    made = engine(folder / options.pop("folder", "untied"), **options)
    in_batch = {key.removeprefix("batch_"): value for key, value in options.items() if key.startswith("batch_")}
    found: dict[str, Any] = {"directions": dict(made.directions.rows), "ends": made.gate.ends}
    made.directions.save(folder / f"{case} {SIZE} {RANK}.safetensors")
    scored = score(made, **in_batch)
    with made.disable_adapter():
        found["of reference"] = sorted(score(made, **in_batch))
    found["columns"] = {name: scored[name].values() for name in scored if name.startswith("gradroute")}
    found["log_probs"] = scored["log_probs"].values()

    found["gradients"], found["figures"] = [], []
    take = made.optimizer.step

    def watched(*args: Any, **kwargs: Any) -> Any:
        found["gradients"].append(whole((n, p.grad) for n, p in made.module.named_parameters() if p.grad is not None))
        return take(*args, **kwargs)

    made.optimizer.step = watched
    found["figures"].append(step(made, scored, **in_batch))
    if case == "packed":
        made.save_checkpoint(str(folder / f"checkpoint {SIZE}"))
    found["figures"].append(step(made, scored, **in_batch))
    found["refreshed"] = dict(made.directions.rows)
    found["reports"] = [(report.step, report.moved) for report in made.refresher.reports]
    params, config = made.get_per_tensor_param(base_sync_done=True)
    found["adapter"], found["config"] = dict(params), {key: config[key] for key in ("r", "lora_alpha")}
    made.model_config.lora["merge"] = True
    found["merged"] = dict(made.get_per_tensor_param()[0])
    type(made).routing = replace(made.routing, rollouts="ablated")
    found["merged, ablated"] = dict(made.get_per_tensor_param()[0])
    made.model_config.lora["merge"] = False
    params, config = made.get_per_tensor_param(base_sync_done=True)
    found["adapter, ablated"], found["config, ablated"] = (
        dict(params),
        {key: config[key] for key in ("r", "lora_alpha")},
    )
    type(made).routing = replace(made.routing, rollouts="on")
    found["weights"] = whole(made.module.named_parameters())
    found["rng"] = torch.get_rng_state()
    if case == "packed":
        resumed = engine(folder / "untied")
        resumed.load_checkpoint(str(folder / f"checkpoint {SIZE}"))
        before = resumed.refresher.steps
        figures = step(resumed, scored)
        found["resumed"] = (before, figures, whole(resumed.module.named_parameters()), dict(resumed.directions.rows))
    torch.save(found, folder / f"{case} {SIZE} {RANK}.pt")


def refusals(folder: Path) -> None:
    """What was asked for and cannot happen: the message of each."""
    found: dict[str, str] = {}

    def refused(name: str, call: Any) -> None:
        try:
            call()
        except gr.GradRouteError as error:
            found[name] = str(error)
        else:
            found[name] = "no error"

    def cached(model: Any, tokenizer: Any) -> Any:
        return copy.copy(first)

    model = folder / "untied"
    first_of_all: Any = {}
    refused("a second call", lambda: register(directions=print))
    refused("no function", lambda: register(directions=first_of_all))
    for name, options in {
        "fsdp": {"engine_strategy": "fsdp"},
        "no LoRA": {"model_lora_rank": 0},
        "other blocks": {"model_lora_rank": 3},
        "pad_to_length": {"engine_pad_to_length": True},
        "offload_policy": {"engine_offload_policy": True},
        "reference": {"engine_forward_only": True},
        "fp16": {"engine_mixed_precision": {"param_dtype": "fp16"}},
    }.items():
        refused(name, lambda options=options: engine(model, **options))
    made = engine(model, model_lora={"rank": 6})
    first = copy.copy(made.directions)
    refused("no route", lambda: step(made, {}))
    scored = score(made)
    refused("outside", lambda: made.forward_step(routed_share(made, scored), routed_loss, False))
    refused("no room", lambda: made.get_per_tensor_param(base_sync_done=True))
    refused("checkpoint engine", made.get_per_tensor_param)
    refused("shards", made.get_per_tensor_param_shard)
    made.save_checkpoint(str(folder / "plain"))
    shutil.rmtree(folder / "plain" / "gradroute")
    refused("no state", lambda: made.load_checkpoint(str(folder / "plain")))
    type(made).routing = replace(made.routing, rollouts="ablated")
    refused("ablated rollouts", lambda: step(made, scored))
    type(made).routing = replace(made.routing, rollouts="on", directions=cached)
    step(made, scored)
    refused("stale", lambda: step(made, scored))
    torch.save(found, folder / "refusals.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    register(
        directions=lambda model, tokenizer: gr.extract_activation_directions(model, PAIRS),
        refresh_every=2, r_quarantine=3,
    )  # fmt: skip
    for name in sys.argv[2:]:
        refusals(Path(sys.argv[1])) if name == "refusals" else run(name, Path(sys.argv[1]))
    leave()
