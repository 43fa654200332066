"""Filters between backward and the optimizer: `apply_filter(model, f)`, once per optimizer step.

    kept = f(g),    removed + kept = g,    p.grad <- kept        for the deployed gradients g

Call it after the last backward of the step, after any reduction across ranks and on unscaled gradients, before
clipping. A filter changes a gradient once: again without a new backward raises. Measuring changes none.
"""

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from gradroute._before_use import before_use
from gradroute._checks import instance_of
from gradroute._optimized import block_parameters
from gradroute._protocol import routed_layers
from gradroute._sharding import overwrite
from gradroute.directions.parameter_rows import check_base_model
from gradroute.errors import GradRouteError
from gradroute.filters.base import GradientFilter
from gradroute.filters.stats import FilterStats

# Gradient -> its version after it was filtered, and by which filters. A new backward makes a new tensor, or raises the
# version of the old one.
_MARKS: Any = WeakTensorKeyDictionary()


def apply_filter(model: nn.Module, f: GradientFilter) -> FilterStats:
    """p.grad <- f(p.grad) for the deployed blocks of `model` (and, in route mode, their quarantines).

    Args:
        model: after backward, with complete gradients.
        f: a `ProjectionFilter` or `RolloutFilter`.

    Returns:
        `FilterStats`: hack-ward share before and after, its random null, share fired, conservation.

    Raises:
        GradRouteError: directions of another base model, a module without a direction, a gradient that is None, not
            finite, or that `f` has changed already; gradients in a form that cannot be filtered (FSDP1, DeepSpeed).
            Nothing is written then.
    """
    instance_of("f", f, GradientFilter, "pass a ProjectionFilter or a RolloutFilter.")  # type: ignore[type-abstract]
    before_use(f)
    parameters = list(block_parameters(model, f.writes_blocks))
    earlier = [_filters_of(parameter.grad) for _, parameter in parameters]
    for (name, _), filters in zip(parameters, earlier, strict=True):
        if f in filters:
            raise GradRouteError(
                f"The gradient of `{name}` has been filtered by this filter already, and no backward has run since. "
                "Fix: call apply_filter once per optimizer step, or use attach_filter, not both."
            )
    with torch.no_grad():
        writes, stats = f.filtered(routed_layers(model))
        if (directions := getattr(f, "directions", None)) is not None:
            check_base_model(directions, model)
        for parameter, values in writes:
            overwrite(parameter.grad, values)
    if not writes:
        return stats
    for (_, parameter), filters in zip(parameters, earlier, strict=True):
        gradient: Any = parameter.grad
        # Filters that ran before are not forgotten because this one has written.
        _MARKS[gradient] = gradient._version, WeakSet([*filters, f])
    return stats


def _filters_of(gradient: Tensor | None) -> list[GradientFilter]:
    """The filters that have run on this gradient since its last backward."""
    if gradient is None:
        return []
    version, filters = _MARKS.get(gradient, (None, []))
    return list(filters) if version == gradient._version else []
