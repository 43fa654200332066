"""The checker of the import hook: what gradroute's `typechecked` does, for every function.

It cannot be imported from gradroute, which is to be imported under the hook.
"""

import random
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def typechecker(function: Callable[..., Any]) -> Callable[..., Any]:
    checked = _check(function)
    settings = getattr(checked, "__kwdefaults__", None) or {}
    if "__beartype_getrandbits" in settings:
        settings["__beartype_getrandbits"] = random.Random(0).getrandbits
    return checked
