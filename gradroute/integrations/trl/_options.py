"""The trainer's options that are values: the keyword and the config's field of one name, checked and made one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gradroute._checks import instance_of, integer_from_zero, one_of, positive_number, share
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError
from gradroute.gates.log_ratio import LogRatioGate
from gradroute.refresh.refresher import Refresher


@dataclass(frozen=True)
class Options:
    """What holds, with the defaults of what was left out; `refresher` and others may be objects, from the keywords."""

    directions: Any = None
    refresher: Any = None
    log_ratio_gate: Any = None
    ablated_fraction: float = 0.0
    detector_recall: float | None = None
    slow_start_steps: int = 0
    slow_start_fraction: float | None = None
    ablated_from: int | None = None
    score_view: str | None = None
    clean_baseline: bool | None = None
    engine: Mapping[str, Any] | None = None
    engine_check: bool | float = True

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of the options, which are those of the config's fields."""
        return tuple(each.name for each in fields(cls))

    @classmethod
    def of(cls, config: Any, **keywords: Any) -> "Options":
        """From a config, or None, and keywords of the trainer; None where one was left out.

        Raises:
            GradRouteError: a keyword and a field that differ, or a value that is none of its option.
        """
        agreed = {name: _agreed(name, keywords[name], getattr(config, name, None)) for name in cls.names()}
        given = {name: value for name, value in agreed.items() if value is not None}
        for name, value in given.items():
            check_option(name, value)
        return cls(**given)


def check_option(name: str, value: Any) -> None:
    """Refuse a value that the option cannot have, whatever the others are.

    Raises:
        GradRouteError: the option, what it should be, and what was found.
    """
    _CHECKS[name](name, value)


def _agreed(name: str, keyword: Any, of_config: Any) -> Any:
    if keyword is None:
        return of_config
    if of_config is not None and not _same(_value_of(keyword), of_config):
        raise GradRouteError(
            f"`{name}` is a keyword of the trainer and a field of GradRouteGRPOConfig, and should be the same in both. "
            f"Found the keyword {name}={keyword!r} and the field {name}={of_config!r}. Fix: leave one of them out."
        )
    return keyword


def _value_of(keyword: Any) -> Any:
    """What a config would say in place of an object."""
    if isinstance(keyword, Refresher):
        return keyword.every
    if isinstance(keyword, LogRatioGate):
        return keyword.threshold
    if isinstance(keyword, Path):
        return str(keyword)
    return dict(keyword) if isinstance(keyword, Mapping) else keyword


def _same(a: Any, b: Any) -> bool:
    # A tolerance of 1 is not True.
    return isinstance(a, bool) is isinstance(b, bool) and bool(a == b)


def _directions(name: str, value: Any) -> None:
    if not isinstance(value, Directions | str | Path) and not callable(value):
        raise GradRouteError(
            f"`{name}` should be Directions, a function of the model, or a file of pairs. Found {value!r}."
        )


def _below_one(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise GradRouteError(f"`{name}` should be in [0, 1). Found {value!r}.")


def _refresher(name: str, value: Any) -> None:
    if not isinstance(value, Refresher) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise GradRouteError(
            f"`{name}` should be a Refresher, or a positive number of optimizer steps. Found {value!r}."
        )


def _log_ratio_gate(name: str, value: Any) -> None:
    if isinstance(value, int | float):
        positive_number(name, value)
    elif not isinstance(value, LogRatioGate):
        raise GradRouteError(f"`{name}` should be a LogRatioGate, or its threshold in nats. Found {value!r}.")


def _slow_start_fraction(name: str, value: Any) -> None:
    if share(name, value) == 1:
        raise GradRouteError(f"`{name}` should be in [0, 1). Found 1: nothing would start slowly.")


def _score_view(name: str, value: Any) -> None:
    one_of(name, value, ("sampled", "ablated"))


def _clean_baseline(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise GradRouteError(f"`{name}` should be True or False, or left out. Found {value!r}.")


def _engine(name: str, value: Any) -> None:
    instance_of(name, value, Mapping, "names and values, such as {'dtype': 'float32'}.")  # type: ignore[type-abstract]


def _engine_check(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        positive_number(name, value)


# That `ablated_fraction` is a whole number of rollouts is checked where the size of a group is known.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "directions": _directions,
    "ablated_fraction": _below_one,
    "refresher": _refresher,
    "log_ratio_gate": _log_ratio_gate,
    "detector_recall": share,
    "slow_start_steps": integer_from_zero,
    "slow_start_fraction": _slow_start_fraction,
    "ablated_from": integer_from_zero,
    "score_view": _score_view,
    "clean_baseline": _clean_baseline,
    "engine": _engine,
    "engine_check": _engine_check,
}
