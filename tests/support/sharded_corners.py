"""What two processes find at the corners of a sharded model: who reads, who writes, and what is refused."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode

import gradroute as gr
from gradroute import _all_ranks
from gradroute._hashing import deployed_hash, known_identity, model_identity
from gradroute._sharding import is_sharded
from gradroute.adapters.peft.plain_lora import PlainLora
from gradroute.integrations.vllm._synced import SyncedViews
from support.engine_twin import followed
from support.sharded_loop import PAIRS, completions, loss_of, routed, sharded, tokens
from support.tiny_models import base_model, config, llama
from support.traffic import Traffic
from support.unwatched import unwatched

Found = dict[str, Any]


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except gr.errors.GradRouteError as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def outcomes(model: nn.Module) -> list[gr.EvalRecord]:
    ablated = next(m for m in model.modules() if isinstance(m, gr.QuarantineLoRA)).view == "ablated"
    return [gr.EvalRecord("tests", True, i, not ablated, ablated) for i in range(8)]


def card(folder: Path, shard: Callable[[nn.Module], nn.Module]) -> str:
    """The text of a card, as this rank finds the file once its own call has returned."""
    model = shard(routed("attach"))
    report = gr.evaluate_on_off(model, outcomes)
    return gr.write_card(model, report, folder / "card", routed_by="Nothing.", masks="None.").read_text()


def written_alone(rank: int, folder: Path) -> Found:
    """Rank 0 exports alone, as under `if is_main_process`; then the rank that writes cannot."""
    model = sharded(routed("PEFT"))
    patience, _all_ranks.PATIENCE = _all_ranks.PATIENCE, timedelta(seconds=1)
    try:
        alone = error_of(lambda: gr.export_deployed(model, folder / "alone")) if rank == 0 else ""
    finally:
        _all_ranks.PATIENCE = patience
    dist.barrier()
    (folder / "blocked" / "adapter_model.safetensors").mkdir(parents=True, exist_ok=True)
    blocked = ""
    try:
        gr.export_deployed(model, folder / "blocked")
    except (OSError, gr.errors.GradRouteError) as error:
        blocked = f"{type(error).__name__}: {error}"
    return {"alone": alone, "wrote": (folder / "alone").exists(), "blocked": blocked}


def adapted_late() -> Found:
    base = sharded(base_model("llama", torch.float64))
    return {
        "attach": error_of(lambda: gr.attach(base, r=2, lora_alpha=4)),
        "get_peft_model": error_of(lambda: get_peft_model(base, config())),
        "merge": error_of(lambda: gr.merge_deployed(sharded(routed("PEFT")))),
        "init": error_of(lambda: gr.adapters.init.pissa_(sharded(routed("attach")))),
    }


def identities() -> Found:
    """Of the whole base and of sharded ones; and how many collectives it takes."""
    found: Found = {"whole": model_identity(base_model("llama", torch.float64))}
    for name, shape in {"hybrid 2 x 1": (2, 1), "hybrid 1 x 2": (1, 2)}.items():
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        found[name] = model_identity(fully_shard(base_model("llama", torch.float64), mesh=mesh))
    model = sharded(routed("PEFT"))
    with CommDebugMode() as traffic:
        found["sharded"] = model_identity(model)
        known_identity(model)
    found["collectives"] = {str(op): count for op, count in traffic.get_comm_counts().items()}
    return found


def rounded_forwards() -> Found:
    """After a forward in bf16 the root group holds rounded parameters: none of them may be read, or trained."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = routed("attach").float()
    before = deployed_hash(model), model_identity(model)
    fully_shard(model, mp_policy=policy)
    with torch.no_grad():
        model(input_ids=tokens(0))
    rounded = not any(is_sharded(p) for p in model.parameters())
    trained = [is_sharded(p) for _, p in gr.deployed_parameters(model)]
    with torch.no_grad():
        model(input_ids=tokens(0))
    after = deployed_hash(model), model_identity(model)
    return {"rounded": rounded, "same": before == after, "trained": all(trained)}


def gathered(model: nn.Module) -> nn.Module:
    """Sharded in one group, whose parameters a forward without gradients leaves whole in their places."""
    fully_shard(model)
    with torch.no_grad():
        model(input_ids=tokens(0))
    return model


def after_a_forward() -> Found:
    """What is refused, and what an optimizer is given, where no parameter looks sharded."""
    base, model = gathered(base_model("llama", torch.float64)), gathered(routed("PEFT"))
    refused = {
        "attach": error_of(lambda: gr.attach(base, r=2, lora_alpha=4)),
        "get_peft_model": error_of(lambda: get_peft_model(base, config())),
        "merge_adapter": error_of(lambda: gathered(routed("PEFT")).merge_adapter()),  # type: ignore[operator]
        "init": error_of(lambda: gr.adapters.init.pissa_(gathered(routed("attach")))),
    }
    groups = gr.optim.block_groups(model)
    return {"refused": refused, "grouped": all(is_sharded(p) for group in groups for p in group["params"])}


def written_in_place() -> bool:
    """Whether a write to the shards of the base is seen."""
    model = sharded(routed("PEFT"))
    before = known_identity(model)
    with torch.no_grad():
        model.get_parameter("base_model.model.model.norm.weight").mul_(2)
    return known_identity(model) != before


def not_refreshed() -> str:
    """What is said of a loop that never calls `refresher.step()`, on parameters in the root's group."""
    model = fully_shard(routed("PEFT"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def train(ids: Tensor, mask: gr.RouteMask) -> None:
        with gr.route(model, mask):
            loss_of(model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return unwatched(model, train, slice(None))


def card_on_one_rank(rank: int, folder: Path) -> str:
    """The card that an export on both ranks puts beside its files; one rank alone can read it."""
    model = sharded(routed("attach"))
    report = gr.evaluate_on_off(model, outcomes)
    file = gr.write_card(model, report, folder / "seen by one", routed_by="Nothing.", masks="None.")
    dist.barrier()
    gr.export_deployed(model, folder / "with card", card=file if rank == 0 else folder / "not here" / "README.md")
    return (folder / "with card" / "README.md").read_text()


class Files(SyncedViews):
    """Views for an engine that keeps what it reads of the files."""

    def _load(self, name: str, path: Path) -> dict[str, Tensor]:
        return load_file(path / "adapter_model.safetensors")

    def _unload(self, held: dict[str, Tensor]) -> None:
        held.clear()


def synced(folder: Path) -> Found:
    """Both views as an engine gets them after a step, and whether they were seen to be old before."""
    model = sharded(routed("attach"))
    views = Files(PlainLora(model), None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss_of(model, tokens(0)).backward()
    optimizer.step()
    with torch.no_grad():
        model(input_ids=tokens(0))
    stale = not views.is_current
    views.sync()
    found = {"stale": stale, "current": views.is_current, **{view: dict(held) for view, held in views.held.items()}}
    views.close()
    gr.export_deployed(model, folder / "ablated")
    gr.export_full(model, folder / "on")
    return found


def scored_in_backward(shard: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """Scores by parameter-shaped directions, whose inner products with gradients are taken in hooks."""
    model, ids = shard(routed("PEFT")), tokens(3)
    with gr.ablate_quarantine(model):
        directions = gr.extract_gradient_directions(model, PAIRS, features="parameter", progress=False)
        with gr.capture_gradients(model, features="parameter", directions=directions) as capture:
            loss_of(model, ids).backward()
    pool = completions(len(ids))
    with gr.ablate_quarantine(model), torch.no_grad(), gr.capture_activations(model, pool=pool) as acts:
        model(input_ids=ids)
    return {"scores": directions.score(capture), **acts}


def moved(call: Callable[[], Any]) -> dict[str, int]:
    """Bytes by kind of collective."""
    with Traffic() as traffic:
        call()
    return dict(traffic.bytes)


def traffic() -> Found:
    """Bytes of a step by rank of the quarantine, of a refresh, and of writing both views; a small model in float32."""
    small, large = (
        sharded(gr.attach(llama(hidden_size=32, intermediate_size=64, head_dim=8), r=4, r_quarantine=r, lora_alpha=8))
        for r in (4, 8)
    )
    steps = [moved(lambda model=model: loss_of(model, tokens(0)).backward()) for model in (small, large)]
    small.zero_grad()

    def extract() -> gr.Directions:
        return gr.extract_activation_directions(small, PAIRS, progress=False)

    with gr.ablate_quarantine(small):
        directions = extract()
    refresher = gr.Refresher(directions, extract, model=small)
    views = Files(PlainLora(small), None)
    return {
        "steps": steps,
        "held": sum(p.to_local().numel() for _, p in gr.quarantine_parameters(small)),
        "refresh": moved(refresher.refresh),
        "features": sum(rows.nbytes for side in (directions.hack, directions.clean) for rows in side.values()),
        "two views": moved(views.sync),
    }


def corners(rank: int, folder: Path) -> Found:
    return {
        **written_alone(rank, folder), **adapted_late(), **identities(), **rounded_forwards(),
        "in backward": scored_in_backward(sharded), "card": card(folder, sharded), "traffic": traffic(),
        "followed": followed(gathered(routed("PEFT")), routed("PEFT")), "after a forward": after_a_forward(),
        "written": written_in_place(), "unwatched": not_refreshed(), "synced": synced(folder / "views"),
        "card of one": card_on_one_rank(rank, folder),
    }  # fmt: skip
