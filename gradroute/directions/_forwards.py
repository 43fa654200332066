"""Counts the forwards of a model, and finds their view, while features are read.

A forward is a call of the outermost module that runs, together with all that it calls. A module that runs twice in one
forward has two rows per rollout, and a model whose layers are in different views is refused.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gradroute._module_tree import Walk, walked
from gradroute._protocol import RoutedLayer
from gradroute._step_hooks import LocalHook
from gradroute.errors import GradRouteError


class Forwards:
    """Counts the forwards of `model` inside `counted()`.

    Args:
        model: the model that is read.
        names: of the modules that are read.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        walk, found = walked(model)
        modules = dict(walk.named(found))
        routed = {name: module for name, module in modules.items() if isinstance(module, RoutedLayer)}
        self._routed = list(routed.values())
        self._inside = {
            name: [routed[name]] if name in routed else _inside(walk, name, modules[name], found) for name in names
        }
        above = {".".join(parts[:i]) for name in self._inside for parts in [name.split(".")] for i in range(len(parts))}
        self._above = [modules[name] for name in sorted(above) if name in modules]
        self._running = self._number = self._compared = 0

    @property
    def number(self) -> int | None:
        """Of the forward that runs now; None if none of the modules above those that are read runs."""
        return self._number if self._running else None

    def view(self, name: str) -> str:
        """The view in which the module `name` runs now; compared over all layers at the first module of a forward.

        Raises:
            GradRouteError: routed layers are in different views.
        """
        first = not self._running or self._compared != self._number
        self._compared = self._number
        layers = self._routed if first or not self._inside[name] else self._inside[name]
        views = sorted({layer.view for layer in layers})
        if len(views) > 1:
            raise GradRouteError(
                f"All routed layers should be in one view while features are read. Found {views}. "
                "Fix: ablate or disable the whole model, or read the part of it that is in one view."
            )
        # A model without routed layers shows what one with all adapters disabled does.
        return views[0] if views else "disabled"

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Hooks on the modules above those that are read, for the duration of the block."""
        handles: list[Any] = []
        try:
            for module in self._above:
                handles.append(module.register_forward_pre_hook(LocalHook(self._enter)))
                handles.append(module.register_forward_hook(LocalHook(self._leave), always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, *_: Any) -> None:
        if self._running == 0:
            self._number += 1
        self._running += 1

    def _leave(self, *_: Any) -> None:
        # A forward that raised before it was counted is left all the same.
        self._running = max(self._running - 1, 0)


def _inside(walk: Walk, name: str, module: nn.Module, found: list[Any]) -> list[RoutedLayer]:
    """The routed layers inside of a block, looked for once in a walk."""
    places = walk.memo.setdefault("inside", {})
    if name not in places:
        inside = {id(each) for each in module.modules() if isinstance(each, RoutedLayer)}
        places[name] = list({id(each): i for i, each in enumerate(found) if id(each) in inside}.values())
    return [found[i] for i in places[name]]
