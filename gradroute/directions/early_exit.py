"""Forwards that end with the last block that is read: blocks above it, and the head, are not run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from gradroute.directions.reading import transformer_blocks
from gradroute.errors import GradRouteError


class _EnoughReadError(Exception):
    """Ends a forward, and is caught by `ended_before`."""


def block_after(model: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """The transformer block that follows the last one that holds any of `names`; None if a forward should run through.

    It should where the last block is read, or something outside the blocks; and where leaving a forward by an exception
    would skip what others do after it (accelerate's and FSDP's hooks, compiled code, DDP), or blocks may run twice.
    """
    unwrapped: Any = model
    base = unwrapped.get_base_model() if hasattr(model, "get_base_model") else model
    if any(hasattr(m, "_hf_hook") or "FSDP" in type(m).__name__ or _compiled(m) for m in model.modules()):
        return None
    try:
        blocks = transformer_blocks(model)
    except GradRouteError:
        return None
    if getattr(getattr(base, "config", None), "num_hidden_layers", None) != len(blocks):
        return None
    holding = [i for name in names for i, block in enumerate(blocks) if f"{name}.".startswith(f"{block}.")]
    after = max(holding, default=len(blocks)) + 1
    if len(holding) < len(names) or after >= len(blocks):
        return None
    return list(blocks.values())[after]


@contextmanager
def ended_before(block: nn.Module | None) -> Iterator[None]:
    """Forwards inside end where `block` would begin, and the with statement with them; None changes nothing."""
    if block is None:
        yield
        return

    def stop(*_: Any) -> None:
        raise _EnoughReadError

    handle = block.register_forward_pre_hook(stop, prepend=True)
    try:
        with suppress(_EnoughReadError):
            yield
    finally:
        handle.remove()


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
