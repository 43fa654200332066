"""Axis names used in every annotation, and the `typechecked` decorator.

| axis         | meaning                                                       |
|--------------|---------------------------------------------------------------|
| `batch`      | rows of a batch: one rollout (prompt + completion) each       |
| `seq`        | token positions                                               |
| `rows`       | pooled rollouts, in the order in which they ran               |
| `pairs`      | contrastive (hack, clean) pairs                               |
| `d_in`       | input width of a linear layer                                 |
| `d_out`      | output width of a linear layer                                |
| `d_feature`  | width of a captured feature (`r`, `d_in` or `d_out`)          |
| `r`          | rank of the deployed block                                    |
| `r_q`        | rank of the quarantine block                                  |
| `k`          | directions per module                                         |

`typechecked` checks shapes and types at run time, and leaves random numbers as found. It costs tens of microseconds a
call and breaks `torch.compile(fullgraph=True)`, so it is for calls made once per step or less, never for a forward or a
hook.
"""

import random
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, jaxtyped

F = TypeVar("F", bound=Callable[..., Any])

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_DRAWS = "__beartype_getrandbits"
_LONGEST = 200


def typechecked(function: F) -> F:
    """Decorator: check shapes and types of one cold public call; an int passes for a float.

    Raises:
        TypeCheckError: names the argument. jaxtyping would dump all the others too, a whole model among them.
    """
    checked = jaxtyped(typechecker=_checked)(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return checked(*args, **kwargs)
        except TypeCheckError as error:
            raise TypeCheckError(_shortened(str(error))) from None

    return cast(F, call)


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` checked by beartype, which picks one item of each sequence: not by the user's random numbers."""
    checked: Callable[..., Any] = _check(function)
    settings = getattr(checked, "__kwdefaults__", None) or {}
    if _DRAWS in settings:
        settings[_DRAWS] = random.Random(0).getrandbits
    return checked


def _shortened(message: str) -> str:
    message = re.sub(r"-{10,}\nCalled with parameters: .*?(?=\nParameter annotations: )", "", message, flags=re.DOTALL)
    found = re.search(r"Actual value: (.*?)\nExpected type: ", message, flags=re.DOTALL)
    if found is not None and len(found[1]) > _LONGEST:
        message = message.replace(found[1], f"{found[1][:_LONGEST]} ...")
    return message
