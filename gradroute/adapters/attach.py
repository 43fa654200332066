"""Adapting any `nn.Module` in place, without PEFT: `attach`, `detach`, and the parameters of each block."""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import nn

from gradroute._protocol import BlockName, RoutedLayer, check_module, routed_layers
from gradroute.adapters.functional import StopGradient
from gradroute.adapters.layer import Attachment, QuarantineLoRA, WrappedLinear
from gradroute.adapters.svd_gain import SvdGain
from gradroute.errors import RouteError, TargetError

Parametrization = Literal["lora", "svd_gain"]


def attach(
    model: nn.Module,
    *,
    r: int = 16,
    r_quarantine: int | None = None,
    lora_alpha: float = 32.0,
    target_modules: str | Sequence[str] = "all-linear",
    stop_gradient: StopGradient = "parameters",
    seed: int = 0,
    parametrization: Parametrization = "lora",
    rotate: bool = False,
) -> nn.Module:
    """Replace each targeted `nn.Linear` by a routed layer around it, freeze everything else, return `model`.

    Args:
        model: any module; changed in place. `detach(model)` undoes it.
        r, r_quarantine, lora_alpha, stop_gradient: see `QuarantineLoRA`.
        target_modules: "all-linear" (every `nn.Linear` but the output head of a Hugging Face model), a regular
            expression that matches whole module names, or a list whose entries are a module's name or its `.suffix`.
        seed: of the initial A matrices; the global generator is not used. "svd_gain" draws nothing.
        parametrization: "lora" (`QuarantineLoRA`: A and B are trained) or "svd_gain" (`SvdGain`: gains on the singular
            directions of the weight).
        rotate: with "svd_gain", give the quarantine a trainable rotation of its directions.

    Raises:
        TargetError: the model is adapted already, by `attach` or by PEFT; an entry of `target_modules` matches nothing,
            or something other than an `nn.Linear`; a size out of range.
    """
    if parametrization not in ("lora", "svd_gain"):
        raise TargetError(f'`parametrization` should be "lora" or "svd_gain". Found {parametrization!r}.')
    if rotate and parametrization != "svd_gain":
        raise TargetError('`rotate=True` rotates singular directions. Fix: parametrization="svd_gain".')
    check_module(model)
    _check_no_peft(model)
    if any(isinstance(module, RoutedLayer) for module in model.modules()):
        raise TargetError("`model` has routed layers already. Fix: detach(model) first.")
    targets = _find_targets(model, target_modules)
    generator = torch.Generator().manual_seed(seed)
    # A linear that is used in two places must stay one module.
    wrapped: dict[nn.Module, WrappedLinear] = {}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        for name, linear in targets.items():
            if linear in wrapped:
                continue
            if parametrization == "lora":
                wrapped[linear] = QuarantineLoRA(
                    linear, r=r, r_quarantine=r_quarantine, lora_alpha=lora_alpha,
                    stop_gradient=stop_gradient, generator=generator,
                )  # fmt: skip
            else:
                wrapped[linear] = SvdGain(
                    linear, r=r, r_quarantine=r_quarantine, lora_alpha=lora_alpha,
                    stop_gradient=stop_gradient, rotate=rotate,
                )  # fmt: skip
            wrapped[linear].name = name
    except BaseException as error:
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        if isinstance(error, TargetError):
            raise TargetError(f"Module `{name}`: {error}") from error
        raise
    for parameter in trainable.values():
        parameter.requires_grad_(False)
    attachment = Attachment(len(wrapped), tuple(trainable))
    for name, linear in targets.items():
        wrapped[linear].attachment = attachment
        _replace(model, name, wrapped[linear])
    return model


def detach(model: nn.Module) -> nn.Module:
    """Put the original linears back and restore their `requires_grad`; both blocks are dropped. Returns `model`.

    Args:
        model: that was given to `attach`; changed in place.

    Raises:
        TargetError: `model` was not given blocks by `attach`, or holds only a part of what was.
        RouteError: inside a route or view, whose end would find no layers.
    """
    check_module(model)
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, WrappedLinear) and module.attachment is not None
    }
    if not layers or "" in layers:
        raise TargetError(f"`model` should have been given blocks by attach(). Found a {type(model).__name__}.")
    attachment = next(iter(layers.values())).attachment
    assert attachment is not None
    found = len(set(layers.values()))
    if found != attachment.layers:
        raise TargetError(
            f"`model` should hold all {attachment.layers} layers that attach() made. Found {found}. "
            "Fix: detach the module that was attached."
        )
    if any(layer.has_open_route or layer.view != "on" for layer in layers.values()):
        raise RouteError("detach(model) inside a route, ablate_quarantine or disable_adapters. Fix: leave it first.")
    name, layer = next(iter(layers.items()))
    root = name.removesuffix(layer.name)
    for name, layer in layers.items():
        _replace(model, name, layer.base_layer)
    for name in attachment.frozen:
        model.get_parameter(root + name).requires_grad_(True)
    return model


def deployed_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every deployed block, named as in `model.named_parameters()`.

    Args:
        model: with routed layers.

    Raises:
        GradRouteError: `model` has none.
    """
    return _block_parameters(model, "deployed")


def quarantine_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter) of every quarantine block, named as in `model.named_parameters()`.

    Args:
        model: with routed layers.

    Raises:
        GradRouteError: `model` has none.
    """
    return _block_parameters(model, "quarantine")


def _block_parameters(model: nn.Module, block: BlockName) -> Iterator[tuple[str, nn.Parameter]]:
    wanted = {id(p) for layer in routed_layers(model).values() for p in layer.block_parameters(block)}
    return ((name, p) for name, p in model.named_parameters() if id(p) in wanted)


def _check_no_peft(model: nn.Module) -> None:
    """PEFT's A and B are linears themselves: "all-linear" would put blocks around those."""
    for name, module in model.named_modules():
        if not isinstance(module, WrappedLinear) and hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            raise TargetError(
                f"`model` has LoRA layers of PEFT already, such as `{name}`. Fix: instead of attaching, give the base "
                "model to get_peft_model with a QuarantineLoraConfig."
            )


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _find_targets(model: nn.Module, target_modules: str | Sequence[str]) -> dict[str, nn.Linear]:
    modules = dict(model.named_modules(remove_duplicate=False))
    del modules[""]
    if target_modules == "all-linear":
        found = _all_linear(model, modules)
        if not found:
            raise TargetError(f'`target_modules="all-linear"` found no nn.Linear inside a {type(model).__name__}.')
        return found
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise TargetError(f"`target_modules` is no regular expression: {target_modules!r} ({error}).") from error
        names = [name for name in modules if pattern.fullmatch(name)]
        if not names:
            raise TargetError(_nothing_matched(target_modules, modules, "A string must match whole module names."))
    else:
        names = []
        if not target_modules or not all(isinstance(entry, str) for entry in target_modules):
            raise TargetError(f"`target_modules` should be names of modules. Found {target_modules!r}.")
        for entry in target_modules:
            matched = [name for name in modules if name == entry or name.endswith(f".{entry}")]
            if not matched:
                raise TargetError(_nothing_matched(entry, modules, "An entry is a module's name or its suffix."))
            names += [name for name in matched if name not in names]
    return {name: _linear(model, name) for name in names}


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Linear]:
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
    return {name: _linear(model, name) for name in linears}


def _linear(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.TransformerEncoderLayer):
        raise TargetError(
            f"`target_modules` matched `{name}`, inside an nn.TransformerEncoderLayer, which in eval mode reads the "
            "weights of its linears and never calls them: blocks there would not run. Fix: leave it out."
        )
    if not isinstance(module, nn.Linear):
        raise TargetError(
            f"`target_modules` matched `{name}`, a {type(module).__name__}; only nn.Linear can be adapted. "
            "Fix: name the linears inside it."
        )
    return module


def _nothing_matched(entry: str, modules: dict[str, nn.Module], rule: str) -> str:
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    leaves = {name.rpartition(".")[2] for name in linears}
    near = difflib.get_close_matches(entry.rpartition(".")[2], sorted(leaves), n=3, cutoff=0.5)
    near += difflib.get_close_matches(entry, linears, n=2, cutoff=0.8)
    if near:
        hint = "Did you mean " + ", ".join(f"`{name}`" for name in dict.fromkeys(near)) + "?"
    else:
        hint = "Linear modules end in " + ", ".join(f"`{leaf}`" for leaf in sorted(leaves)[:12]) + "."
    return f"`{entry}` in `target_modules` matched nothing. {rule} {hint}"
