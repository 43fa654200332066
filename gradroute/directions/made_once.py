"""What is made of directions once per version, and not in each micro-batch: their rows on a device, say."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gradroute._transfers import moved_together
from gradroute.directions.estimators.base import Estimate

Made = TypeVar("Made")


class _Known(NamedTuple):
    """The things made, and the tensors that they were made of, with the stamp of these."""

    stamp: tuple[Any, ...]
    sources: list[Tensor]  # kept, so that no other tensor can get the id of one of them
    made: dict[Hashable, Any]


_KNOWN: WeakKeyDictionary[Any, _Known] = WeakKeyDictionary()


def made_once(directions: Any, key: Hashable, make: Callable[[], Made]) -> Made:
    """`make()`, or what it returned for this key before, if the directions are as they were.

    They are not after `update_`, nor where rows, centre or scale were replaced or written to.

    Args:
        directions: `Directions` that `make` reads.
        key: of what is made, and all else that it depends on.
        make: it may read rows, centre and scale.
    """
    groups = (directions.rows, directions.centre or {}, directions.scale or {})
    sources = [tensor for group in groups for tensor in group.values()]
    # An inference tensor has no version.
    writes = tuple(0 if tensor.is_inference() else tensor._version for tensor in sources)
    stamp = (directions.version, tuple(map(id, sources)), writes)
    known = _KNOWN.get(directions)
    if known is None or known.stamp != stamp:
        known = _KNOWN[directions] = _Known(stamp, sources, {})
    if key not in known.made:
        known.made[key] = make()
    found: Made = known.made[key]
    return found


def estimate_on(directions: Any, devices: Mapping[str, torch.device]) -> Estimate:
    """Rows, centre and scale of the modules in `devices`, each on its device."""
    estimate: Estimate = directions.estimate
    groups = [group for group in (estimate.rows, estimate.centre, estimate.scale) if group is not None]
    if all(group[name].device == device for group in groups for name, device in devices.items() if name in group):
        return estimate

    def make() -> Estimate:
        centre, scale = (None if each is None else _moved(each, devices) for each in (estimate.centre, estimate.scale))
        return Estimate(_moved(estimate.rows, devices), centre, scale, estimate.heldout)

    return made_once(directions, ("estimate", tuple(devices.items())), make)


def weights_on(directions: Any, devices: Mapping[str, torch.device]) -> dict[str, Tensor]:
    """`directions.weights()`, each on its device."""
    return made_once(directions, ("weights", tuple(devices.items())), lambda: _moved(directions.weights(), devices))


def _moved(group: Mapping[str, Tensor], devices: Mapping[str, torch.device]) -> dict[str, Tensor]:
    homes = [devices.get(name, tensor.device) for name, tensor in group.items()]
    return dict(zip(group, moved_together(list(group.values()), homes), strict=True))
