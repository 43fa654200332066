"""The modules of a model, walked once, and again only after one was added, removed, replaced or renamed.

    the walk is current   <=>   every module in it has the class, and under the same names the children, that it had

Whatever is new hangs below a module that was there, so that none escapes; comparing is faster than walking. Nothing is
written into the model, and no module is kept alive. A copy of a model, and a wrapper around it, are roots of their own.

Wrappers are torch.compile, DDP, FSDP1 and activation checkpointing around a whole module; names go without them.
"""

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

_children = attrgetter("_modules")
_INNER = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class Walk:
    """What a walk of `model` found.

    Args:
        model: the root; it may be given up.

    `memo` is for what else was found in these modules, without keeping them.
    """

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_modules())
        children = list(map(_children, named.values()))
        edges = [child for below in children for child in below.values()]
        place = {id(module): i for i, module in enumerate(edges, start=1)} | {id(model): 0}
        places = [place[id(module)] for module in named.values()]
        self.memo: dict[str, Any] = {}
        self._named = list(zip(named, places, strict=True))
        self._refs = [_nothing if module is None else ref(module) for module in edges]
        self._types = list(map(type, [model, *edges]))
        self._parents = [i for i, below in zip(places, children, strict=True) if below]
        self._leaves = [i for i, below in zip(places, children, strict=True) if not below]
        self._names = list(chain.from_iterable(children))
        self._counts = [len(below) for below in children if below]

    def current(self, model: nn.Module) -> list[Any] | None:
        """The modules as `named` takes them; None where another walk would find others.

        It is asked in every step, of thousands of modules: hence lists that are compared as a whole.
        """
        edges: list[Any] = [reference() for reference in self._refs]
        found = [model, *edges]
        # A module that is gone has the class of None.
        if list(map(type, found)) != self._types or any(map(_children, [found[i] for i in self._leaves])):
            return None
        children = [found[i]._modules for i in self._parents]
        if list(map(len, children)) != self._counts or list(chain.from_iterable(children)) != self._names:
            return None
        # Modules have no equality but identity.
        return found if [child for below in children for child in below.values()] == edges else None

    def named(self, found: list[Any]) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) in the order of `named_modules`, of what `current` has returned."""
        return ((name, found[place]) for name, place in self._named)


_WALKS: WeakKeyDictionary[nn.Module, Walk] = WeakKeyDictionary()


def walked(model: nn.Module) -> tuple[Walk, list[Any]]:
    """A walk of the model that is current, and its modules."""
    walk = _WALKS.get(model)
    found = None if walk is None else walk.current(model)
    if walk is None or found is None:
        walk = _WALKS[model] = Walk(model)
        found = walk.current(model)
        assert found is not None
    return walk, found


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """`dict(model.named_modules())`."""
    walk, found = walked(model)
    return dict(walk.named(found))


def _nothing() -> None:
    """In the place of a child that is None."""


def inner_of(module: nn.Module) -> nn.Module | None:
    """The module inside of a wrapper; None if `module` is no wrapper."""
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module._modules["module"]
    return next((child for name in _INNER if (child := module._modules.get(name)) is not None), None)


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` without the wrappers around it."""
    while (inner := inner_of(model)) is not None:
        model = inner
    return model


def plain_name(name: str) -> str:
    """A module's name without the wrappers that lie inside the model."""
    return ".".join(part for part in name.split(".") if part not in _INNER)
