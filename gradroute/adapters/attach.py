"""Adapt any `nn.Module` in place, without PEFT: `attach`, `detach`, the parameters of each block and their numbers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from gradroute._checks import listed, one_of
from gradroute._logging import warn
from gradroute._module_tree import plain_name
from gradroute._protocol import BLOCKS, BlockName, RoutedLayer, check_module, routed_layers
from gradroute._sharding import reshard, size_of
from gradroute.adapters._signposts import put_signposts, take_signposts
from gradroute.adapters._targets import find_targets, refused_by_peft
from gradroute.adapters.layer import Attachment, QuarantineLoRA, StopGradient, WrappedLinear
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
    one_of("parametrization", parametrization, get_args(Parametrization), TargetError)
    if rotate and parametrization != "svd_gain":
        raise TargetError('`rotate=True` rotates singular directions. Fix: parametrization="svd_gain".')
    check_module(model)
    _check_no_peft(model)
    if any(isinstance(module, RoutedLayer) for module in model.modules()):
        raise TargetError("`model` has routed layers already. Fix: detach(model) first.")
    targets = find_targets(model, target_modules)
    sizes: Any = {"r": r, "r_quarantine": r_quarantine, "lora_alpha": lora_alpha, "stop_gradient": stop_gradient}
    wrap: Callable[[nn.Linear], WrappedLinear] = partial(SvdGain, **sizes, rotate=rotate)
    if parametrization == "lora":
        wrap = partial(QuarantineLoRA, **sizes, generator=torch.Generator().manual_seed(seed))
    # A linear that is used in two places must stay one module.
    wrapped: dict[nn.Module, WrappedLinear] = {}
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        for name, linear in targets.items():
            if linear not in wrapped:
                wrapped[linear] = wrap(linear)
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
        replace_module(model, name, wrapped[linear])
    put_signposts(model)
    for name in refused_by_peft(model, list(targets))[:1]:
        warn(
            f"PEFT refuses to load an adapter on `{name}`, so export_deployed will refuse this model. "
            "Fix: leave it out of `target_modules`, or ship by merge_deployed."
        )
    return model


def detach(model: nn.Module) -> nn.Module:
    """Put the original linears back and restore their `requires_grad`; both blocks are dropped. Returns `model`.

    Args:
        model: that was given to `attach`; changed in place.

    Raises:
        TargetError: `model` was not given blocks by `attach`, or holds only a part of what was.
        RouteError: inside a route or view.
    """
    check_module(model)
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: m for name, m in modules if isinstance(m, WrappedLinear) and m.attachment is not None}
    if not layers or "" in layers:
        raise TargetError(f"`model` should have been given blocks by attach(). Found a {type(model).__name__}.")
    first, layer = next(iter(layers.items()))
    # Names without wrappers: blocks may have been checkpointed or compiled since they were attached.
    root, attachment = plain_name(first).removesuffix(layer.name), layer.attachment
    assert attachment is not None
    found = len(set(layers.values()))
    if found != attachment.layers:
        raise TargetError(
            f"`model` should hold all {attachment.layers} layers that attach() made. Found {found}. "
            "Fix: detach the module that was attached."
        )
    if any(layer.has_open_route or layer.view != "on" for layer in layers.values()):
        raise RouteError("detach(model) inside a route, ablate_quarantine or disable_adapters. Fix: leave it first.")
    named = {plain_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    lost = [name for name in attachment.frozen if _current(root + name, named) is None]
    if lost:
        raise TargetError(
            f"`model` should still have the parameters that attach() froze. Found none that is called {listed(lost)}. "
            "Fix: detach before modules are renamed or replaced."
        )
    take_signposts(model)
    for name, layer in layers.items():
        replace_module(model, name, layer.base_layer)
    for name in attachment.frozen:
        _current(root + name, named).requires_grad_(True)
    return model


def _current(name: str, named: Mapping[str, nn.Parameter]) -> Any:
    """The parameter that had this name before `attach`; None if there is none."""
    owner, _, leaf = name.rpartition(".")
    return named.get(name, named.get(f"{owner}.base_layer.{leaf}"))


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
    reshard(model)
    wanted = {id(p) for layer in routed_layers(model).values() for p in layer.block_parameters(block)}
    return ((name, p) for name, p in model.named_parameters() if id(p) in wanted)


@dataclass(frozen=True, repr=False)
class ParameterSummary:
    """Numbers of parameters; `print` it.

    Args:
        layers: number of routed layers.
        deployed, quarantine: trainable parameters of each block.
        total: parameters of the whole model, frozen ones included.
        trained_elsewhere: name -> number, of parameters that are trained outside of the blocks, past every mask.
    """

    layers: int
    deployed: int
    quarantine: int
    total: int
    trained_elsewhere: dict[str, int]

    def __repr__(self) -> str:
        elsewhere = sum(self.trained_elsewhere.values())
        trainable = self.deployed + self.quarantine + elsewhere
        text = (
            f"trainable params: {trainable:,d} (deployed {self.deployed:,d} + quarantine {self.quarantine:,d} in "
            f"{self.layers} layers"
        )
        if elsewhere:
            text += f" + {elsewhere:,d} elsewhere: {', '.join(list(self.trained_elsewhere)[:3])}"
        return f"{text}) || all params: {self.total:,d} || trainable%: {100 * trainable / self.total:.4f}"


def parameter_summary(model: nn.Module) -> ParameterSummary:
    """Count the trainable parameters of each block, and those of the whole model; `print` the result.

    Args:
        model: with routed layers.

    Raises:
        GradRouteError: `model` has no routed layers.
    """
    layers = routed_layers(model)
    elsewhere = {id(p): (name, size_of(p)) for name, p in model.named_parameters() if p.requires_grad}
    numbers = []
    for block in BLOCKS:
        ours = {id(p) for layer in layers.values() for p in layer.block_parameters(block)}
        numbers.append(sum(elsewhere.pop(key)[1] for key in ours & elsewhere.keys()))
    total = sum(size_of(p) for p in model.parameters())
    return ParameterSummary(len(layers), numbers[0], numbers[1], total, dict(elsewhere.values()))


def _check_no_peft(model: nn.Module) -> None:
    """PEFT's A and B are linears themselves: "all-linear" would put blocks around those."""
    for name, module in model.named_modules():
        if not isinstance(module, WrappedLinear) and hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            raise TargetError(
                f"`model` has LoRA layers of PEFT already, such as `{name}`. Fix: instead of attaching, give the base "
                "model to get_peft_model with a QuarantineLoraConfig."
            )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
