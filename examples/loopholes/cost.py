"""What a run costs: tokens that went through the model, and optimizer steps, evaluation left out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class Meter:
    """Counts tokens in the forwards of `model`, and steps of all optimizers, while it is open and not paused."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.tokens, self.steps, self._paused = model, 0, 0, False

    @contextmanager
    def open(self) -> Iterator["Meter"]:
        """Counts inside the block."""
        handles = (
            self.model.get_input_embeddings().register_forward_pre_hook(self._embedded),
            register_optimizer_step_post_hook(self._stepped),
        )
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside the block costs nothing: it only measures."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _embedded(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._paused:
            self.tokens += args[0].numel()

    def _stepped(self, *_: Any) -> None:
        self.steps += not self._paused
