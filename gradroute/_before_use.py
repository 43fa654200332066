"""Checks that gates and filters run before they use directions.

A gate does not know its refresher: the refresher registers a check, by weak reference, on the directions that it
refreshes and on the gates and filters that it watches. Copies and pickles of those carry no checks.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

from gradroute.errors import RefreshError

Check = Callable[[], None]

_CHECKS: WeakKeyDictionary[Any, list[WeakMethod[Check]]] = WeakKeyDictionary()


def check_before_use(used: Any, check: Check) -> Callable[[], None]:
    """Have the method `check` called before each use of `used`; returns the function that ends this.

    Args:
        used: directions, or a gate or filter that reads them.
        check: a bound method, which raises where `used` must not be used.
    """
    registered = WeakMethod(check)
    # Checks whose owner is gone give way to those of its successor.
    _CHECKS[used] = [*(each for each in _CHECKS.get(used, ()) if each() is not None), registered]

    def end() -> None:
        _CHECKS[used] = [each for each in _CHECKS.get(used, ()) if each is not registered]

    return end


def before_use(reader: Any) -> None:
    """Run the checks on `reader`, a gate or filter, and on the directions that it reads.

    Raises:
        RefreshError: what a check raises; the refresher that watched `reader` is gone.
    """
    for used in (reader, getattr(reader, "directions", None)):
        for registered in () if used is None else _CHECKS.get(used, ()):
            check = registered()
            if check is not None:
                check()
            elif used is reader:
                raise RefreshError(
                    f"The Refresher that watched this {type(reader).__name__} should be there. Found that it was "
                    "deleted, so nothing refreshes the directions. Fix: keep the refresher and call its step(), or "
                    "close() what watch() returned to go on with frozen directions."
                )
