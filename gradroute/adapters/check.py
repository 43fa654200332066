"""Find what is unsupported in a model, and say why, before a run is spent on it."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradroute._all_ranks import check_all_ranks
from gradroute._protocol import Block, BlockName, RoutedLayer, check_module, routed_layers
from gradroute._transfers import is_offloaded
from gradroute.adapters._targets import embeddings, gives_one_tensor
from gradroute.adapters.attach import parameter_summary
from gradroute.adapters.layer import RoutedLinear, WrappedLinear
from gradroute.errors import GradRouteError


@dataclass(frozen=True)
class Finding:
    """One thing in a model that gradient routing cannot handle, or does not handle as one might think.

    Args:
        module: qualified name.
        severity: "error": it raises, or must not be used so; "warning": it works, and the reason says what to know.
        reason: what was found, why it matters, and the fix.
    """

    module: str
    severity: Literal["error", "warning"]
    reason: str

    def __str__(self) -> str:
        return f"{self.severity}: `{self.module}`: {self.reason}"


def check_model(model: nn.Module) -> list[Finding]:
    """Walk `model`, with or without routed layers, and list what is unsupported in it and why; empty if nothing is.

    Before adapting: parts that cannot be targeted, offloaded weights. After: parameters that are trained past every
    mask, frozen blocks, adapters without a quarantine, merged, sharded or offloaded layers, forwards that somebody
    replaced, routes left open, checkpointing that cannot be followed, attached blocks that PEFT would not load. The
    model is not run and not changed. Of a sharded model every rank calls it.

    Args:
        model: any module. What would raise elsewhere is a `Finding` here.

    Raises:
        GradRouteError: `model` is no module at all, or sharded and not checked by all ranks.
    """
    check_all_ranks("check_model", check_module(model))
    modules = list(model.named_modules())
    findings = [Finding(name, "warning", reason) for name, part in modules for reason in _untargetable(name, part)]
    findings += _tied_head(model)
    findings += _checkpointing(model)
    findings += _without_values(model)
    if not any(isinstance(module, RoutedLinear) for module in model.modules()):
        return findings
    try:
        layers = routed_layers(model)
    except GradRouteError as error:
        return [*findings, Finding("", "error", str(error))]
    for name, layer in layers.items():
        if isinstance(layer, RoutedLinear):
            findings += _layer(name, layer)
    findings += _replaced_forwards(model, layers)
    if any(finding.severity == "error" for finding in findings):
        return findings
    past_masks = (
        "it is trained by every row, flagged ones too: what it learns from them is deployed. Fix: freeze it, or do "
        "without `modules_to_save`."
    )
    findings += [Finding(name, "warning", past_masks) for name in parameter_summary(model).trained_elsewhere]
    return [*findings, *_not_exportable(model)]


def _untargetable(name: str, module: nn.Module) -> Iterator[str]:
    kind, fix = type(module).__name__, "Fix: leave it out of the targets; it is refused."
    if isinstance(module, nn.MultiheadAttention):
        yield f"{kind} reads the weight of its `out_proj` and never calls it: blocks there would not run. {fix}"
    if isinstance(module, nn.TransformerEncoderLayer):
        yield f"{kind} in eval mode reads the weights of its linears and calls none of them. Fix: leave these out."
    packed = [key for key, p in module._parameters.items() if p is not None and p.ndim == 3]
    if packed and not isinstance(module, nn.modules.conv._ConvNd):
        yield (
            f"its parameters {packed} hold many matrices each (packed experts): no layer whose tokens a mask could "
            "reach. Fix: target the attention; they stay frozen, and are refused as targets."
        )
    if name.rpartition(".")[2] == "experts" and any(isinstance(m, nn.Linear) for m in module.modules()):
        yield (
            "experts run on the tokens that were sent to them, whose rows are not known: as targets they raise under a "
            "mask. Fix: leave them out of the targets."
        )
    if isinstance(module, nn.Linear) and not gives_one_tensor(module):
        yield f"a {kind} does not give one tensor of its out_features (a router): no blocks can be added to it. {fix}"
    if hasattr(module, "qweight"):
        yield f"{kind} is quantised in a way that has no routed layer. Fix: load it in bf16, or with bitsandbytes."


def _tied_head(model: nn.Module) -> Iterator[Finding]:
    head, inputs = embeddings(model, "output"), embeddings(model, "input")
    weight = getattr(head, "weight", None)
    if isinstance(head, RoutedLinear) and isinstance(weight, Tensor) and weight is getattr(inputs, "weight", None):
        name = next(name for name, module in model.named_modules() if module is head)
        yield Finding(
            name, "warning", "its weight is shared with the input embeddings: training is exact, merging would change "
            "both and is refused. Fix: export_deployed, or leave the head out of the targets."
        )  # fmt: skip


def _without_values(model: nn.Module) -> Iterator[Finding]:
    routed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, RoutedLinear))
    without = [(n, m) for n, m in model.named_modules() if any(p.is_meta for p in m.parameters(recurse=False))]
    outside = [(name, module) for name, module in without if not f"{name}.".startswith(routed)]
    for name, module in outside[:1]:
        if is_offloaded(module):
            yield Finding(
                name, "warning", f"it is offloaded by accelerate, with {len(outside) - 1} others: views can be "
                "evaluated, new blocks are refused. Fix: adapt the model first and offload it then."
            )  # fmt: skip
        else:
            yield Finding(name, "error", "it is on the meta device, without values. Fix: load the model first.")


def _replaced_forwards(model: nn.Module, layers: Mapping[str, RoutedLayer]) -> Iterator[Finding]:
    for name, module in model.named_modules():
        if _calls_its_own(module):
            continue
        inside = [layer for layer in layers if layer == name or layer.startswith(f"{name}." if name else "")]
        if inside:
            forward = _inside_partials(module.forward)
            called = getattr(forward, "__qualname__", type(forward).__name__)
            yield Finding(
                name, "error" if name in layers else "warning", f"its `forward` was replaced by `{called}`, as fused "
                f"kernels do: if it reads weights without calling the layers, {len(inside)} of them (`{inside[0]}`) "
                "run past every mask and view. Fix: turn that patch off."
            )  # fmt: skip


def _calls_its_own(module: nn.Module) -> bool:
    """Whether a forward that was put on this very object says that it wraps the class's own (accelerate's do)."""
    forward = module.__dict__.get("forward")
    if forward is None or "_old_forward" in module.__dict__:
        return True
    forward = inspect.unwrap(forward)
    return getattr(forward, "__func__", forward) is type(module).forward


def _inside_partials(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


def _not_exportable(model: nn.Module) -> Iterator[Finding]:
    if any(isinstance(module, WrappedLinear) for module in model.modules()) and find_spec("peft") is not None:
        # peft takes seconds to import, and this is the only check that asks it.
        from gradroute.adapters.peft.export import export_refusal  # noqa: PLC0415

        refusal = export_refusal(model)
        if refusal is not None:
            yield Finding("", "warning", f"export_deployed will refuse it. {refusal}")


def _checkpointing(model: nn.Module) -> Iterator[Finding]:
    for name, module in model.named_modules():
        function = _inside_partials(module.__dict__.get("_gradient_checkpointing_func"))
        origin = getattr(function, "__module__", "").partition(".")[0]
        # transformers' own wrapper offloads what torch's checkpoint saves.
        if function is not None and origin not in ("torch", "transformers"):
            yield Finding(
                name, "error", f"gradient checkpointing by `{origin}`: whether a "
                "recomputation runs under its forward's mask cannot be known. Fix: use torch.utils.checkpoint."
            )  # fmt: skip


def _layer(name: str, layer: RoutedLinear) -> Iterator[Finding]:
    try:
        blocks: dict[BlockName, Block] = {"deployed": layer.deployed, "quarantine": layer.quarantine}
    except GradRouteError as error:
        yield Finding(name, "error", str(error))
        return
    if layer.merged:
        yield Finding(name, "error", "it is merged: neither route nor ablation can reach it. Fix: unmerge.")
    sharded = [key for key, m in layer.named_modules() if key.startswith("lora_") and "FSDP" in type(m).__name__]
    if sharded:
        yield Finding(
            name, "error", f"its `{sharded[0]}` is sharded on its own, and the layer reads it without the call "
            "that would gather it. Fix: fully_shard whole decoder layers, not the small linears."
        )  # fmt: skip
    if layer.has_open_route:
        yield Finding(name, "error", "a route is open. Fix: clear_route(model), or leave the `with` block.")
    if layer.view != "on":
        yield Finding(name, "warning", f"it shows the {layer.view} view. Fix: leave that block if it is not meant.")
    for block_name, block in blocks.items():
        parameters = list(layer.block_parameters(block_name))
        if any(p.is_meta for p in parameters):
            yield Finding(
                name, "error", f"its {block_name} block is on the meta device, not loaded or offloaded by accelerate: "
                "offloaded, it can be evaluated, but not trained. Fix: keep adapted layers in memory."
            )  # fmt: skip
            continue
        if not all(p.requires_grad for p in parameters):
            yield Finding(name, "warning", f"its {block_name} block is frozen. Fix: requires_grad_() before training.")
        devices = {block.A.device, block.B.device, next(layer.get_submodule("base_layer").parameters()).device}
        if len(devices) > 1:
            yield Finding(name, "error", f"its parts are on {sorted(map(str, devices))}. Fix: model.to(one device).")
            continue
        block = block.whole(name)  # noqa: PLW2901
        if ((block.A == 0).all(1) & (block.B == 0).all(0)).any():
            yield Finding(
                name, "error", f"its {block_name} block has a rank that is zero in A and B: it never learns, and "
                "after a hot-swap of another rank the scaling is the old one. Fix: load_quarantined again."
            )  # fmt: skip
        if not (torch.isfinite(block.A).all() and torch.isfinite(block.B).all()):
            yield Finding(name, "error", f"its {block_name} block is not finite. Fix: go back to an earlier step.")
