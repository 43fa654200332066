"""The two processes of the distributed cells.

    python ranks.py RANK FOLDER

runs every scenario in float64 as one of them; rank 0 leaves the gradients of each in FOLDER. `Ranks` starts both.
"""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from two_pass import Batch, batch, gradients, loss_of, routed_model, rows_mask, weighted_tokens_mask

import gradroute as gr
from gradroute.adapters import PendingMask

WORLD_SIZE = 2
Step = tuple[Batch, gr.RouteMask]


def zones(*names: str) -> gr.RouteMask:
    return gr.RouteMask.zones(names)


# The micro-batches of each rank.
BATCHES: dict[str, tuple[list[Step], list[Step]]] = {
    "rank 0 all keep, rank 1 mixed": (
        [(batch(0), zones("keep", "keep", "keep"))],
        [(batch(1), rows_mask())],
    ),
    "rank 0 all route, rank 1 all keep": (
        [(batch(0), zones("route", "route", "route"))],
        [(batch(1), zones("keep", "keep", "keep"))],
    ),
    "two micro-batches with a mask each": (
        [(batch(0), weighted_tokens_mask()), (batch(1), zones("keep", "keep", "keep"))],
        [(batch(2), rows_mask()), (batch(3), zones("route", "keep", "route"))],
    ),
}
# Name of a scenario: (its batches, `use_reentrant` of its activation checkpoints or None without them, whether
# its masks are decided after the forward).
SCENARIOS: dict[str, tuple[str, bool | None, bool]] = {
    **{batches: (batches, None, False) for batches in BATCHES},
    "the same with checkpoints, use_reentrant=False": ("two micro-batches with a mask each", False, False),
    "the same with checkpoints, use_reentrant=True": ("two micro-batches with a mask each", True, False),
    "the same, decided late": ("two micro-batches with a mask each", None, True),
    "the same, decided late, use_reentrant=False": ("two micro-batches with a mask each", False, True),
    "the same, decided late, use_reentrant=True": ("two micro-batches with a mask each", True, True),
}


def checkpointed(model: nn.Module, use_reentrant: bool | None) -> nn.Module:
    if use_reentrant is not None:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        if use_reentrant:
            model.enable_input_require_grads()
    return model


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=False)


def fsdp(model: nn.Module) -> nn.Module:
    for layer in [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]:
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {"DDP": ddp, "FSDP2": fsdp}


def run(rank: int, folder: Path) -> None:
    for adapters, wrapper, scenario in itertools.product(("PEFT", "attach"), WRAPPERS, SCENARIOS):
        batches, use_reentrant, late = SCENARIOS[scenario]
        model = WRAPPERS[wrapper](checkpointed(routed_model("llama", adapters), use_reentrant))
        *first, last = BATCHES[batches][rank]
        for rows, mask in first:
            with model.no_sync() if wrapper == "DDP" else nullcontext():
                backward(model, rows, mask, late)
        backward(model, *last, late)
        found = {name.removeprefix("module."): whole(gradient) for name, gradient in gradients(model).items()}
        if rank == 0:
            torch.save(found, folder / file_name(adapters, wrapper, scenario))


def backward(model: nn.Module, rows: Batch, mask: gr.RouteMask, late: bool) -> None:
    with gr.route(model, PendingMask(mask.m) if late else mask) as route:
        loss = loss_of(model, rows)
        if late:
            route.decide(mask)
        loss.backward()


class Ranks:
    """Both processes, from the parent's side; they run beside other tests until somebody waits for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for rank in range(WORLD_SIZE):
            with self._log(rank).open("wb") as output:
                command = [sys.executable, str(Path(__file__)), str(rank), str(self.folder)]
                self.processes.append(subprocess.Popen(command, stdout=output, stderr=output))

    def wait(self, seconds: float) -> None:
        """Until both are through; if one failed, the other would wait for it for ever.

        Raises:
            RuntimeError: a process failed, or hangs.
        """
        deadline = time.monotonic() + seconds
        while any(p.poll() is None for p in self.processes) and not any(p.poll() for p in self.processes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        codes = [process.poll() for process in self.processes]
        if codes != [0] * WORLD_SIZE:
            self.end()
            logs = "\n".join(f"rank {rank}:\n{self._log(rank).read_text()[-3000:]}" for rank in range(WORLD_SIZE))
            raise RuntimeError(f"The processes should end with 0. Found {codes} (None: still running).\n{logs}")

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.log"


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def file_name(adapters: str, wrapper: str, scenario: str) -> str:
    return f"{adapters}, {wrapper}, {scenario}.pt"


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # Where the machine's name resolves to nothing, gloo finds no interface by itself.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    run(rank, folder)
    # Once both have written everything. Taking gloo down now and then aborts the process ("terminate called").
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
