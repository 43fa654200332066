"""Filters on two processes over gloo: what each rank ends up with, written to a file for the test to compare."""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradroute as gr
from gradroute._protocol import routed_layers
from gradroute.filters import apply_filter, attach_filter
from gradroute.filters.projection import ProjectionFilter
from gradroute.filters.rollout import RolloutFilter
from support.gradient_directions import drawn_directions
from support.models import randomize_blocks
from support.processes import leave

CASES = ["ddp-erase", "ddp-rollout", "fsdp-erase", "fsdp-route", "ddp-updates", "fsdp-updates"]
ROWS = 8
REMOVED = torch.tensor([1.0, 0, 0, 0.5, 0, 1, 1, 0], dtype=torch.float64)


class Blocks(nn.Module):
    """Two linears of sizes that do not divide by two."""

    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.upper(torch.tanh(self.lower(x)))


def build(kind: str = "lora") -> nn.Module:
    torch.manual_seed(0)
    model = Blocks().double()
    gr.attach(model, r=3, lora_alpha=4.0, parametrization=kind)
    return randomize_blocks(model)


def inputs() -> Tensor:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, p in [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]]


def filtered_rows(case: str, wrapped: nn.Module, model: nn.Module, x: Tensor, removed: Tensor) -> dict[str, Tensor]:
    """One step with a filter attached; the deployed gradients that the optimizer got, whole."""
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    if "rollout" in case:
        f = RolloutFilter(drawn_directions(build(), seed=2), lambda scores: removed)
        handle = attach_filter(optimizer, f, model=model)
        with f.record(model):
            wrapped(x).square().sum(1).mean().backward()
    else:
        directions = drawn_directions(build("svd_gain" if "route" in case else "lora"), 2)
        f = ProjectionFilter(directions, mode="route" if "route" in case else "erase", side="two")
        handle = attach_filter(optimizer, f, model=model)
        wrapped(x).square().sum(1).mean().backward()
    optimizer.step()
    assert handle.steps == 1
    gradients = {}
    for name, layer in routed_layers(model).items():
        for block in ("deployed", "quarantine"):
            parts = [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in layer.block_parameters(block)]
            gradients[f"{name} {block}"] = torch.cat([part.flatten() for part in parts])
    gradients["cin"] = torch.tensor([handle.stats.cin, handle.stats.cout])
    return gradients


def updated(wrapped: nn.Module, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Three steps under everything that acts on realised updates; its figures, and the parameters, whole."""
    directions = drawn_directions(build(), seed=2)
    optimizer = torch.optim.AdamW(trained(model), lr=0.1, weight_decay=0.0)
    with gr.audit_updates(model, optimizer, directions) as audits, gr.optim.decay_toward_start(model, optimizer, 0.1):
        for step in range(3):
            optimizer.zero_grad()
            wrapped(x).square().sum(1).mean().backward()
            if step == 2:
                audit = audits.read()
                projection = gr.optim.project_updates(model, optimizer, directions)
            optimizer.step()
    purged = gr.optim.purge_moments(model, optimizer, directions, side="two")
    figures = [audit.deployed.gradient_norm, audit.deployed.update_norm, audit.quarantine.update_norm]
    found = {"figures": torch.tensor([*figures, audit.cout, projection.removed_share, purged], dtype=torch.float64)}
    for name, parameter in gr.deployed_parameters(model):
        found[name] = getattr(parameter, "full_tensor", lambda p=parameter: p)().detach()
    return found


def run_case(case: str, wrapped: nn.Module, model: nn.Module, x: Tensor, removed: Tensor) -> dict[str, Tensor]:
    return updated(wrapped, model, x) if "updates" in case else filtered_rows(case, wrapped, model, x, removed)


def expected(case: str) -> dict[str, Tensor]:
    model = build("svd_gain" if "route" in case else "lora")
    return run_case(case, model, model, inputs(), REMOVED)


def refusal(model: nn.Module, record: bool) -> str:
    """What applying a filter to the gradients of a sharded model says."""
    sharded = fully_shard_or_flat(model, flat=not record)
    f = RolloutFilter(drawn_directions(build())) if record else None
    try:
        with f.record(model) if f is not None else nullcontext():
            sharded(inputs()).square().sum().backward()
        apply_filter(model, f or ProjectionFilter(drawn_directions(build()), mode="erase"))
    except gr.GradRouteError as error:
        return str(error)
    return "not refused"


def fully_shard_or_flat(model: nn.Module, flat: bool) -> nn.Module:
    if flat:
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    found: dict[str, object] = {}
    for case in CASES:
        model = build("svd_gain" if "route" in case else "lora")
        wrapped = fully_shard_or_flat(model, flat=False) if "fsdp" in case else DistributedDataParallel(model)
        found[case] = run_case(case, wrapped, model, inputs()[half], REMOVED[half])
    found["sharded rollouts"] = refusal(build(), record=True)
    found["flat parameters"] = refusal(build(), record=False)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
