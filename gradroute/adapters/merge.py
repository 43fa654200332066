"""Fold the deployed block into the base weight: W <- W + s_d B_d A_d. The quarantine is dropped with its layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gradroute._sharding import is_split, reshard
from gradroute._transfers import check_in_memory
from gradroute.adapters.attach import detach, replace_module
from gradroute.adapters.layer import RoutedLinear, WrappedLinear, routed_linears
from gradroute.adapters.views import ablate_quarantine
from gradroute.errors import GradRouteError, RouteError, TargetError


def merge_deployed(model: nn.Module) -> nn.Module:
    """Merge the deployed block into the base weights and drop the quarantine; returns a plain model.

    Args:
        model: from `attach`, `get_peft_model`, or with an adapter injected by PEFT or transformers; it is used up.

    Returns:
        The plain model: PEFT's wrapper is removed, an attached model is changed in place.

    Raises:
        RouteError: inside a route or a view, or merged already; a sharded model.
        GradRouteError: a deployed block is not finite.
        TargetError: a targeted weight is shared with a module that is not targeted (tied embeddings): merging would
            change that one too.
    """
    layers = routed_linears(model)
    reshard(model)
    _check_mergeable(layers)
    _check_untied(model, layers)
    if not any(isinstance(layer, WrappedLinear) for layer in layers.values()):
        if not hasattr(model, "merge_and_unload"):
            _unload_injected(model, layers)
            return model
        peft_model: Any = model
        with ablate_quarantine(model):
            merged: nn.Module = peft_model.merge_and_unload()
        return merged
    deltas = [(layer.deployed, layer.base_weight()) for layer in layers.values()]
    detach(model)
    with torch.no_grad():
        for block, weight in deltas:
            A, B = (factor.float() if weight.dtype.itemsize < 4 else factor for factor in (block.A, block.B))
            weight.copy_(weight + block.scaling * (B @ A))
    return model


def _unload_injected(model: nn.Module, layers: Mapping[str, RoutedLinear]) -> None:
    """Do as PEFT's `merge_and_unload`, for a model that has no PeftModel around it."""
    with ablate_quarantine(model):
        for layer in layers.values():
            injected: Any = layer
            injected.merge()
    for name, module in list(model.named_modules()):
        wrapped: Any = module
        if isinstance(module, RoutedLinear):
            replace_module(model, name, wrapped.get_base_layer())
        elif "modules_to_save" in module._modules and wrapped.active_adapters:
            replace_module(model, name, wrapped.modules_to_save[wrapped.active_adapters[0]])
    # PEFT and transformers recognise an adapted model by these.
    for mark in ("peft_config", "active_adapter"):
        model.__dict__.pop(mark, None)
    if "_hf_peft_config_loaded" in model.__dict__:
        model._hf_peft_config_loaded = False  # type: ignore[assignment]


def _check_mergeable(layers: Mapping[str, RoutedLinear]) -> None:
    for name, layer in layers.items():
        if layer.merged:
            raise RouteError(f"merge_deployed(model): `{name}` is merged already. Fix: unmerge first.")
        if layer.has_open_route or layer.view != "on":
            raise RouteError("merge_deployed(model) inside a route, ablation or disable_adapters. Fix: leave it first.")
        if is_split(layer):
            raise RouteError(
                f"merge_deployed(model): `{name}` is sharded, in groups that hold its blocks. Fix: export_deployed("
                "model, path), load the export onto another copy of the base model, and merge there."
            )
        block = layer.deployed
        check_in_memory(name, block.A, block.B)
        if isinstance(layer, WrappedLinear):
            check_in_memory(name, layer.base_weight())  # PEFT fetches the weights that it merges into
        if not (torch.isfinite(block.A).all() and torch.isfinite(block.B).all()):
            raise GradRouteError(
                f"The deployed block of `{name}` should be finite. Found inf or nan. Fix: go back to an earlier step."
            )


def _check_untied(model: nn.Module, layers: Mapping[str, RoutedLinear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        for parameter in layer.get_submodule("base_layer").parameters():
            others = [other for other in owners.get(id(parameter), []) if not other.startswith(f"{name}.")]
            if others:
                raise TargetError(
                    f"The weight of `{name}` is shared with `{others[0]}`, which merging would change too. "
                    "Fix: exclude it from the targets, or export_deployed(model, path)."
                )
