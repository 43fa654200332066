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
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from jaxtyping import jaxtyped

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))
_DRAWS = "__beartype_getrandbits"


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` checked by beartype, which picks one item of each sequence: not by the user's random numbers."""
    checked: Callable[..., Any] = _check(function)
    settings = getattr(checked, "__kwdefaults__", None) or {}
    if _DRAWS in settings:
        settings[_DRAWS] = random.Random(0).getrandbits
    return checked


typechecked = jaxtyped(typechecker=_checked)
"""Decorator: check shapes and types of one cold public call; an int passes for a float."""
