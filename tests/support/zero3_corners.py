"""What two processes find on models that DeepSpeed's ZeRO-3 partitions in a loop of one's own.

    python zero3_corners.py FOLDER

One step of SGD with a learning rate of one is the gradient.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

import gradroute as gr
from gradroute._sharding import whole
from gradroute.integrations.deepspeed import register_blocks
from support.models import randomize_blocks
from support.processes import leave
from support.sharded_loop import ROWS, loss_of, tokens
from support.sharding_shims import deepspeed_on_cpu
from support.tiny_models import base_model, config, peft_model
from support.unwatched import unwatched

ZONES = gr.RouteMask.zones(torch.tensor([0, 1, 2, 1, 2, 0, 1, 2]))
# Nothing is so small that it would be kept whole.
STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
SETTINGS = {
    "train_micro_batch_size_per_gpu": ROWS // 2, "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False, "zero_optimization": STAGE_3,
}  # fmt: skip
Found = dict[str, Any]


def routed(**options: Any) -> nn.Module:
    if not options:
        return peft_model("llama", torch.float32)
    return randomize_blocks(get_peft_model(base_model("llama", torch.float32), config(**options)), 0, std=0.2)


def partitioned(model: nn.Module) -> Any:
    import deepspeed

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    engine, *_ = deepspeed.initialize(model=register_blocks(model), optimizer=optimizer, config=SETTINGS)
    return engine


def values(model: nn.Module) -> dict[str, Tensor]:
    """Of both blocks, whole."""
    return {
        name: whole(p, name).clone() for name, p in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]
    }


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except gr.GradRouteError as error:
        return str(error)
    return "not refused"


def step(rows: slice) -> Found:
    """A routed step of some rows of the batch; of all of them on one process."""
    model = routed()
    if rows == slice(None):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        with gr.route(model, ZONES):
            loss_of(model, tokens(0)).backward()
        optimizer.step()
        return values(model)
    engine = partitioned(model)
    with gr.route(model, ZONES[rows]):
        engine.backward(loss_of(engine, tokens(0)[rows]))
    engine.step()
    return values(model)


def not_refreshed(rows: slice) -> str:
    """What is said of a loop that never calls `refresher.step()`."""
    model = routed()
    engine = partitioned(model)

    def train(ids: Tensor, mask: gr.RouteMask) -> None:
        with gr.route(model, mask):
            engine.backward(loss_of(engine, ids))
        engine.step()

    return unwatched(model, train, rows)


def exported_modules(folder: Path) -> dict[str, Tensor]:
    """What an export holds beside LoRA, and what it should."""
    model = routed(modules_to_save=["lm_head"])
    expected = next(p.detach().clone() for name, p in model.named_parameters() if "modules_to_save" in name)
    partitioned(model)
    gr.export_deployed(model, folder)
    return expected


def gains() -> list[tuple[int, ...]]:
    """The shapes of svd_gain's frozen factors on a base that is partitioned already."""
    import deepspeed

    base = base_model("llama", torch.float32)
    deepspeed.zero.Init(module=base, config_dict_or_path=SETTINGS)
    gr.attach(base, r=2, lora_alpha=4, parametrization="svd_gain", target_modules=["q_proj"])
    layer = next(module for module in base.modules() if isinstance(module, gr.adapters.SvdGain))
    return [tuple(buffer.shape) for buffer in layer.buffers()]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    deepspeed_on_cpu()
    import deepspeed

    deepspeed.init_distributed("gloo")
    rank = int(os.environ["RANK"])
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    merged = routed()
    partitioned(merged)
    found = {
        "step": step(rows),
        "unwatched": not_refreshed(rows),
        "modules": exported_modules(folder / "modules"),
        "merge": message(merged.merge_adapter),  # type: ignore[operator]
        "gains": gains(),
    }
    torch.save(found, folder / f"{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
