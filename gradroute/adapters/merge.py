"""Folding the deployed block into the base weight: W <- W + s_d B_d A_d. The quarantine is dropped with its layer."""

from typing import Any

import torch
from torch import nn

from gradroute.adapters.attach import detach
from gradroute.adapters.layer import routed_linears
from gradroute.adapters.modes import ablate_quarantine
from gradroute.errors import RouteError, TargetError
from gradroute.protocol import Block, RoutedLayer


def merge_deployed(model: nn.Module) -> nn.Module:
    """The base model with the deployed block merged and the quarantine gone, as a plain model.

    Args:
        model: from `attach`, `get_peft_model`, or with an adapter injected by PEFT or transformers; it is used up.

    Returns:
        The plain model: PEFT's wrapper is removed, an attached model is changed in place.

    Raises:
        RouteError: inside a route or a view.
        TargetError: a targeted weight is shared with a module that is not targeted (tied embeddings): merging would
            change that one too.
    """
    layers = routed_linears(model)
    if any(layer.has_open_route or layer.view != "on" for layer in layers.values()):
        raise RouteError("merge_deployed(model) inside a route, ablation or disable_adapters. Fix: leave it first.")
    for layer in layers.values():
        list(layer.block_parameters("deployed"))  # raises where no adapter with a quarantine is the active one
    _check_untied(model)
    peft_model: Any = model
    if hasattr(model, "merge_and_unload"):
        with ablate_quarantine(model):
            merged: nn.Module = peft_model.merge_and_unload()
        return merged
    if any(hasattr(layer, "merge") for layer in layers.values()):
        with ablate_quarantine(model):
            for name, layer in layers.items():
                injected: Any = layer
                injected.merge()
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, injected.get_base_layer())
        return model
    deltas = {name.removesuffix("."): (layer.deployed, layer.base_weight()) for name, layer in layers.items()}
    detach(model)
    with torch.no_grad():
        for block, weight in deltas.values():
            weight.copy_(_merged(block, weight))
    return model


def _merged(block: Block, weight: torch.Tensor) -> torch.Tensor:
    delta = block.scaling * (block.B.float() @ block.A.float() if weight.dtype.itemsize < 4 else block.B @ block.A)
    return (weight + delta).to(weight.dtype)


def _check_untied(model: nn.Module) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in model.named_modules():
        if not isinstance(module, RoutedLayer):
            continue
        for parameter in module.get_submodule("base_layer").parameters():
            others = [other for other in owners.get(id(parameter), []) if not other.startswith(f"{name}.")]
            if others:
                raise TargetError(
                    f"The weight of `{name}` is shared with `{others[0]}`, which merging would change too. "
                    "Fix: exclude it from the targets, or export_deployed(model, path)."
                )
