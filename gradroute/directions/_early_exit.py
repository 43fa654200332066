"""Forwards that end with the last block that is read: blocks above it, and the head, are not run.

Only where nothing can tell the difference: the model's blocks have been seen to run once each and in order, and no
module that would be left early or skipped has a hook or a forward that somebody else put there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.nn.modules import module as hooks

from gradroute.directions._reading import transformer_blocks
from gradroute.errors import GradRouteError

_IN_ORDER: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""First blocks of models whose blocks ran once each and in order, and how many there are."""


class _EnoughReadError(Exception):
    """Ends a forward, and is caught where it was asked for."""


class EarlyExit:
    """`with exit.forward(): called(...)`: the forward ends with the last block that holds any of `names`.

    Args:
        model: with routed layers.
        names: of the modules that are read.
        called: what the forwards call, if it is a part of the model.

    The first forward of a model runs through, and is watched. Also every later one where the last block is read, or
    something outside the blocks; where blocks ran twice or in another order; and where leaving by an exception would
    skip what others do after a forward (hooks, replaced and compiled forwards, FSDP, DDP, outputs that are collected).
    """

    def __init__(self, model: nn.Module, names: Sequence[str], called: nn.Module | None = None) -> None:
        self._blocks = _blocks(model)
        holding = [i for name in names for i, block in enumerate(self._blocks) if f"{name}.".startswith(f"{block}.")]
        self._read = max(holding, default=0) + 1
        if len(holding) < len(names) or self._read >= len(self._blocks) or self._is_watched(called or model):
            self._blocks = {}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around one forward."""
        blocks = list(self._blocks.values())
        if not blocks:
            yield
            return
        ran: list[int] = []
        watching = _IN_ORDER.get(blocks[0]) != len(blocks)

        def enter(place: int) -> None:
            ran.append(place)
            if not watching and place >= self._read:
                raise _EnoughReadError

        handles = [
            block.register_forward_pre_hook(lambda *_, place=i: enter(place), prepend=True)
            for i, block in enumerate(blocks)
        ]
        try:
            with suppress(_EnoughReadError):
                yield
        finally:
            for handle in handles:
                handle.remove()
        if ran == list(range(len(blocks))):
            _IN_ORDER[blocks[0]] = len(blocks)

    def _is_watched(self, called: nn.Module) -> bool:
        """Whether somebody would notice: outside of the embeddings and blocks that run to their end."""
        unwrapped: Any = called
        base = unwrapped.get_base_model() if hasattr(called, "get_base_model") else unwrapped
        # Activation checkpointing of a frozen model hooks its embeddings.
        embeddings = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
        before = [*list(self._blocks.values())[: self._read], *([] if embeddings is None else [embeddings])]
        whole = {module for part in before for module in part.modules()}
        return bool(
            hooks._global_forward_hooks
            or hooks._global_forward_pre_hooks
            or any(_is_hooked(module) for module in called.modules() if module not in whole)
        )


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a Hugging Face model that is called as it is; none of any other."""
    unwrapped: Any = model
    base = unwrapped.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(base, "config", None)
    if any("FSDP" in type(m).__name__ or _is_compiled(m) for m in model.modules()):
        return {}
    try:
        blocks = transformer_blocks(model)
    except GradRouteError:
        return {}
    collecting = getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False)
    return {} if collecting or getattr(config, "num_hidden_layers", None) != len(blocks) else blocks


def _is_hooked(module: nn.Module) -> bool:
    replaced = "forward" in module.__dict__ or hasattr(module, "_hf_hook")
    return bool(replaced or module._forward_hooks or module._forward_pre_hooks)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
