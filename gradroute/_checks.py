"""Checks of arguments. Each returns the value, or raises with the argument, what was expected and what was found."""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from gradroute.errors import GradRouteError

T = TypeVar("T")


def described(value: Any) -> str:
    """The type and shape of a tensor, or what a value is instead, for a message."""
    return f"{value.dtype}, {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def finite_number(argument: str, value: Any, error: type[GradRouteError] = GradRouteError) -> float:
    """`value` as a float, if it is a finite number and no boolean."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise error(f"`{argument}` should be finite. Found {value!r}.")
    return float(value)


def instance_of(
    argument: str, value: Any, kind: type[T], fix: str = "", error: type[GradRouteError] = GradRouteError
) -> T:
    """`value`, if it is a `kind`."""
    if not isinstance(value, kind):
        fix = f" Fix: {fix}" if fix else ""
        article = "an" if kind.__name__[0] in "AEIO" else "a"
        raise error(f"`{argument}` should be {article} {kind.__name__}. Found {type(value).__name__}.{fix}")
    return value


def integer_from_zero(argument: str, value: Any, error: type[GradRouteError] = GradRouteError) -> int:
    """`value`, if it is an integer of 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise error(f"`{argument}` should be an integer from 0 on. Found {value!r}.")
    return value


def listed(names: Sequence[str]) -> str:
    """The first five of some names, for a message."""
    return ", ".join(f"`{name}`" for name in names[:5]) + (" ..." if len(names) > 5 else "")


def one_of(argument: str, value: Any, options: Sequence[T], error: type[GradRouteError] = GradRouteError) -> T:
    """`value`, if it is one of `options`."""
    if value not in options:
        named = [f'"{option}"' if isinstance(option, str) else repr(option) for option in options]
        raise error(f"`{argument}` should be {', '.join(named[:-1])} or {named[-1]}. Found {value!r}.")
    found: T = value
    return found


def positive_integer(argument: str, value: Any, error: type[GradRouteError] = GradRouteError) -> int:
    """`value`, if it is an integer of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise error(f"`{argument}` should be a positive integer. Found {value!r}.")
    return value


def positive_number(argument: str, value: Any, error: type[GradRouteError] = GradRouteError) -> float:
    """`value` as a float, if it is positive and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise error(f"`{argument}` should be a positive finite number. Found {value!r}.")
    return float(value)


def share(argument: str, value: Any, error: type[GradRouteError] = GradRouteError) -> float:
    """`value` as a float, if it lies in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise error(f"`{argument}` should be a share in [0, 1]. Found {value!r}.")
    return float(value)
