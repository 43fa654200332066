"""A plain training loop in float64, on one process or on two that `fully_shard` the model between them.

    python sharded_loop.py FOLDER

runs every case as one of two processes over gloo, and leaves what it found in FOLDER. `alone(case)` is one process.
"""

import sys
from collections.abc import Callable
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import gradroute as gr
from gradroute._hashing import block_fingerprint, deployed_hash, model_identity
from gradroute._sharding import is_sharded, whole
from gradroute.filters import ProjectionFilter, apply_filter
from support.models import randomize_blocks
from support.processes import leave
from support.tiny_models import VOCAB, base_model, peft_model

ROWS, LENGTH, PROMPT = 8, 7, 3
PAIRS = [
    gr.ContrastivePair([3, 4, 5], [20, 21], [22, 23, 24]),
    gr.ContrastivePair([6, 7], [20, 25, 21, 9], [22]),
    gr.ContrastivePair([8, 9], [21, 20, 20], [24, 23, 26, 27]),
]
CASES = ["PEFT", "attach", "svd_gain"]
Found = dict[str, Any]


def routed(case: str) -> nn.Module:
    """Two layers, 16 wide, float64, with blocks that are not zero; sizes that two ranks cannot share equally."""
    if case == "PEFT":
        return peft_model("llama", torch.float64)
    model = base_model("llama", torch.float64)
    gr.attach(model, r=3, r_quarantine=4, lora_alpha=6, parametrization="lora" if case == "attach" else case)
    return randomize_blocks(model, 0, std=0.2).eval()


def sharded(model: nn.Module) -> nn.Module:
    for layer in [module for module in model.modules() if type(module).__name__ == "LlamaDecoderLayer"]:
        fully_shard(layer)
    return fully_shard(model)


def tokens(seed: int) -> Tensor:
    return torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))


def completions(rows: int) -> Tensor:
    return (torch.arange(LENGTH) >= PROMPT).expand(rows, LENGTH)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logp = model(input_ids=ids).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    return -logp.gather(2, ids[:, PROMPT:, None]).mean()


class Loop:
    """Directions, a gate on them, a filter, a refresher and an optimizer, as a user would set them up.

    Args:
        model: routed, sharded or not.
        rows: of each batch that this process has.
        state: of a checkpoint, to go on from there.
        saved: the directions that were saved with it.
    """

    def __init__(self, model: nn.Module, rows: slice, state: Found | None = None, saved: Path | None = None) -> None:
        self.model, self.rows = model, rows
        # Gradient directions first: they are extracted with frozen parameters, which have to train afterwards.
        feature = "bottleneck" if any(isinstance(m, gr.adapters.SvdGain) for m in model.modules()) else "parameter"
        erased = self._extract(lambda: gr.extract_gradient_directions(model, PAIRS, features=feature, progress=False))
        self.filter = ProjectionFilter(erased, mode="erase", side="two")
        self.directions = self._extract(self._activations)
        self.gate = gr.BandGate(self.directions)
        trained = [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]
        self.optimizer = torch.optim.AdamW([p for _, p in trained], lr=0.02, weight_decay=0.0)
        if state is not None and saved is not None:
            # Before any handle is put on the optimizer: to set its state, torch makes a step of zero length.
            self._load(state, saved)
        self.refresher = gr.Refresher(self.directions, self._activations, model=model, every=2)
        self.refresher.watch(self.optimizer, self.gate)
        self.audits = gr.audit_updates(model, self.optimizer)
        self.decay = gr.optim.decay_toward_start(model, self.optimizer, 0.1)
        self.idle = gr.optim.skip_idle_blocks(model, self.optimizer)
        for name in ("gate", "refresher", "decay") if state is not None else ():
            getattr(self, name).load_state_dict(state[name])
        self.found: Found = {"erased": dict(erased.rows), "directions": dict(self.directions.rows)}

    def _activations(self) -> gr.Directions:
        return gr.extract_activation_directions(self.model, PAIRS, progress=False)

    def _extract(self, make: Callable[[], gr.Directions]) -> gr.Directions:
        with gr.ablate_quarantine(self.model):
            return make()

    def step(self, seed: int) -> None:
        ids, model = tokens(seed)[self.rows], self.model
        with (
            torch.no_grad(),
            gr.ablate_quarantine(model),
            gr.capture_activations(model, pool=completions(len(ids))) as acts,
        ):
            model(input_ids=ids)
        scores = self.directions.score(acts)
        mask = self.gate(scores)
        with gr.route(model, mask):
            loss_of(model, ids).backward()
        gradients = {name: whole(p.grad).clone() for name, p in blocks(model)}
        stats = apply_filter(model, self.filter)
        filtered = {name: whole(p.grad).clone() for name, p in gr.deployed_parameters(model)}
        self.optimizer.step()
        audit = self.audits.read()
        self.optimizer.zero_grad()
        report = self.refresher.step()
        self.found[f"step {seed}"] = {
            "scores": gathered(scores), "routed": gathered(mask.routed), "gradients": gradients, "filtered": filtered,
            "figures": torch.tensor([stats.cin, stats.cout, audit.deployed.update_norm, audit.quarantine.update_norm]),
            "refreshed": None if report is None else {**self.directions.rows},
            "angle": None if report is None else report.largest_angle,
        }  # fmt: skip

    def state(self) -> Found:
        """A checkpoint, of both blocks alone, the same on every rank."""
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
        return {
            # Copies: without shards torch hands out the tensors that are trained.
            "model": deepcopy(get_model_state_dict(self.model, options=options)),
            "optimizer": deepcopy(get_optimizer_state_dict(self.model, self.optimizer, options=options)),
            "gate": self.gate.state_dict(),
            "refresher": self.refresher.state_dict(),
            "decay": self.decay.state_dict(),
        }

    def _load(self, state: Found, saved: Path) -> None:
        options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
        set_model_state_dict(self.model, state["model"], options=options)
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=options)
        directions = gr.Directions.load(saved, model=self.model)
        for name in ("rows", "hack", "clean", "provenance", "version", "step"):
            setattr(self.directions, name, getattr(directions, name))


def blocks(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [*gr.deployed_parameters(model), *gr.quarantine_parameters(model)]


def gathered(values: Tensor) -> Tensor:
    if not dist.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p).clone() for name, p in blocks(model)}


def run(case: str, rows: slice, folder: Path, shard: Callable[[nn.Module], nn.Module]) -> Found:
    """Four steps, what is made of the model then, and the last two steps again from a checkpoint of the first two."""
    model = shard(routed(case))
    loop = Loop(model, rows)
    loop.step(0)
    loop.step(1)
    state = loop.state()
    if rows.start == 0:
        loop.directions.save(folder / "directions.safetensors")
    loop.step(2)
    loop.step(3)
    found = {**loop.found, "values": values(model)}
    found["sharded"] = any(is_sharded(p) for _, p in blocks(model))
    found["identity"], found["hash"] = model_identity(model), deployed_hash(model)
    found["fingerprint"] = block_fingerprint(model, "deployed")
    found["summary"], found["findings"] = repr(gr.parameter_summary(model)), list(map(str, gr.check_model(model)))
    resumed = Loop(shard(routed(case)), rows, state, folder / "directions.safetensors")
    resumed.step(2)
    resumed.step(3)
    found["resumed"] = values(resumed.model)
    if case != "svd_gain":
        gr.export_deployed(model, folder / "deployed")
        gr.export_full(model, folder / "full")
    if case == "PEFT":
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        saved = get_model_state_dict(model, options=options)
        if rows.start == 0:
            model.save_pretrained(str(folder / "checkpoint"), state_dict=saved)
    return found


def alone(case: str, folder: Path) -> Found:
    folder.mkdir(parents=True, exist_ok=True)
    return run(case, slice(0, ROWS), folder, lambda model: model)


def main(folder: Path) -> None:
    from support.sharded_corners import corners

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    rank = dist.get_rank()
    half = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    for case in CASES:
        (folder / case).mkdir(exist_ok=True)
        torch.save(run(case, half, folder / case, sharded), folder / case / f"rank{rank}.pt")
    torch.save(corners(rank, folder), folder / f"corners {rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
