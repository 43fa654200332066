"""Wrappers around a whole module (torch.compile, DDP, FSDP1, activation checkpointing), and names without them."""

from torch import nn

_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def inner_of(module: nn.Module) -> nn.Module | None:
    """The module inside of a wrapper; None if `module` is no wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner: nn.Module = module.module
        return inner
    return next((child for name in _INNER if (child := module._modules.get(name)) is not None), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` without the wrappers around it."""
    while (inner := inner_of(model)) is not None:
        model = inner
    return model


def plain_name(name: str) -> str:
    """A module's name without the wrappers that lie inside the model."""
    return ".".join(part for part in name.split(".") if part not in _INNER)
