"""`GradRouteGRPOConfig`: TRL's config, with those options of the trainer that are values; and what holds of both.

    keyword of the trainer     field of the config     what holds
    left out                   left out                the default
    given                      left out                the keyword
    left out                   given                   the field
    given                      given                   both, if they say the same; else an error that names both

A field has the name of its keyword, and None means that it was left out. So the files that hold TRL's options, and the
loggers that report them, have those of the routing too.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from trl.trainer.grpo_config import GRPOConfig

from gradroute._checks import instance_of, integer_from_zero, one_of, positive_number, share
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError
from gradroute.gates.log_ratio import LogRatioGate
from gradroute.refresh.refresher import Refresher


def _directions(name: str, value: Any) -> None:
    if not isinstance(value, Directions | str | Path) and not callable(value):
        raise GradRouteError(
            f"`{name}` should be Directions, a function of the model, or a file of pairs. Found {value!r}."
        )


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


def _true_or_false(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise GradRouteError(f"`{name}` should be True or False, or left out. Found {value!r}.")


def _below_one(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise GradRouteError(f"`{name}` should be a share in [0, 1), below 1. Found {value!r}.")


def _engine_check(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        positive_number(name, value)


CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "directions": _directions,
    "refresher": _refresher,
    "log_ratio_gate": _log_ratio_gate,
    "ablated_fraction": _below_one,
    "detector_recall": share,
    "slow_start_steps": integer_from_zero,
    "slow_start_fraction": _below_one,
    "ablated_from": integer_from_zero,
    "score_view": partial(one_of, options=("sampled", "ablated")),
    "clean_baseline": _true_or_false,
    "engine": partial(instance_of, kind=Mapping, fix="names and values, such as {'dtype': 'float32'}."),  # type: ignore[type-abstract]
    "engine_check": _engine_check,
}
"""Each option that is a value: refuses a value that it cannot have, whatever the others are."""


@dataclass(frozen=True)
class Options:
    """What holds, with the defaults of what was left out; `refresher` and others may be objects, from the keywords."""

    gate: Any = None
    grad_filter: Any = None
    detector: Any = None
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
    def of(cls, config: Any, **keywords: Any) -> "Options":
        """From a config, or None, and keywords of the trainer; None where one was left out.

        Raises:
            GradRouteError: a keyword and a field that differ, or a value that is none of its option.
        """
        for name, check in CHECKS.items():
            keywords[name] = _agreed(name, keywords[name], getattr(config, name, None))
            if keywords[name] is not None:
                check(name, keywords[name])
        return cls(**{name: value for name, value in keywords.items() if value is not None})


def _agreed(name: str, keyword: Any, of_config: Any) -> Any:
    if keyword is None or of_config is None:
        return of_config if keyword is None else keyword
    value = keyword
    # What a config would say in place of an object.
    if isinstance(keyword, Refresher):
        value = keyword.every
    elif isinstance(keyword, LogRatioGate):
        value = keyword.threshold
    elif isinstance(keyword, Path):
        value = str(keyword)
    elif isinstance(keyword, Mapping):
        value = dict(keyword)
    # A tolerance of 1 is not True.
    if isinstance(value, bool) is not isinstance(of_config, bool) or value != of_config:
        raise GradRouteError(
            f"`{name}` is a keyword of the trainer and a field of GradRouteGRPOConfig, and should be the same in both. "
            f"Found the keyword {name}={keyword!r} and the field {name}={of_config!r}. Fix: leave one of them out."
        )
    return keyword


def group_share(fraction: float, group_size: int) -> int:
    """How many rollouts of a group of `group_size` are sampled ablated; `fraction` has to give a whole number."""
    share = round(fraction * group_size)
    if abs(share - fraction * group_size) > 1e-6:
        raise GradRouteError(
            f"`ablated_fraction` should be a whole number of the {group_size} rollouts of a group (num_generations). "
            f"Found {fraction:g} of {group_size}. Fix: {share}/{group_size}, or another num_generations."
        )
    return share


def _option(help: str, **metadata: Any) -> Any:
    return field(default=None, metadata={"help": help, **metadata})


@dataclass
class GradRouteGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig`, with those options of `GradRouteGRPOTrainer` that are values; None is as if left out there.

    Args:
        directions: a file of contrastive pairs that `load_pairs` reads. The trainer extracts the directions from it,
            with its `processing_class`. Chat messages become token ids as its prompts do, by `chat_template_kwargs`.
        refresher: optimizer steps between two extractions of the directions.
        log_ratio_gate: the threshold of a `LogRatioGate`, in nats.
        ablated_fraction, detector_recall, slow_start_steps, slow_start_fraction, ablated_from: the trainer's keywords
            of the same names.
        score_view, clean_baseline, engine, engine_check: the same.

    Only a trainer with `GradRouteMixin` reads these fields. With one of them set, any other raises when its training
    begins.

    Raises:
        GradRouteError: a value that the trainer would refuse, or an object that no file of options can hold.
    """

    # These may be given as JSON on the command line.
    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "engine"]  # noqa: RUF012  # no field, as in TRL

    directions: str | None = _option(
        "File of contrastive pairs (.jsonl or .json), of texts or chat messages, that directions are "
        "extracted from. Left out: the trainer's keyword."
    )
    refresher: int | None = _option(
        "Optimizer steps between two extractions of the directions. Left out: they stay as they were."
    )
    log_ratio_gate: float | None = _option(
        "Route rollouts whose best prefix the quarantine makes likelier by more than this many nats. Left "
        "out: not asked."
    )
    ablated_fraction: float | None = _option(
        "Share of each group of num_generations that is sampled without the quarantine; a whole number of "
        "rollouts. Left out: 0."
    )
    detector_recall: float | None = _option(
        "Share of all hacks that the detector flags, as far as it is known. Left out: not known."
    )
    slow_start_steps: int | None = _option(
        "Optimizer steps at the start in which the deployed block has a smaller learning rate. Left out: 0."
    )
    slow_start_fraction: float | None = _option(
        "Fraction of the learning rate in the steps of the slow start. Left out: 0.25."
    )
    ablated_from: int | None = _option(
        "Optimizer step from which ablated_fraction applies. Left out: once the slow start is over."
    )
    score_view: str | None = _option(
        "With directions, score rollouts with the quarantine ablated, in a forward more (ablated), or each "
        "in the state in which it was sampled, without one (sampled). Left out: ablated.",
        choices=["sampled", "ablated"],
    )
    clean_baseline: bool | None = _option(
        "Whether the deployed block's advantages are relative to unflagged rollouts. Left out: wherever "
        "something flags rollouts before their backward."
    )
    engine: dict[str, Any] | str | None = _option(  # noqa: RUF009  # makes a field
        "With use_vllm, arguments of vllm.LLM, or of ServerViews for a server; on the command line as JSON."
    )
    engine_check: float | str | None = _option(
        "With use_vllm, whether the engine is checked before the first rollout (true or false), or the "
        "tolerance of this check in nats. Left out: true."
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._is_read = False
        if isinstance(self.engine_check, str):
            with suppress(ValueError):  # other text stays as it is, for the check to name
                self.engine_check = json.loads(self.engine_check.lower())
        for name, check in CHECKS.items():
            value = getattr(self, name)
            if value is None:
                continue
            try:
                json.dumps(value)
            except TypeError:
                raise GradRouteError(
                    f"`{name}` of a GradRouteGRPOConfig should be a value that files of options can hold. Found "
                    f"{value!r}. Fix: give it to the trainer, by its keyword `{name}`."
                ) from None
            check(name, value)
        if self.ablated_fraction is not None:
            group_share(self.ablated_fraction, cast("int", self.num_generations))

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """transformers', which every trainer asks for as its training begins.

        Raises:
            GradRouteError: a trainer that does not route, with fields of the routing set.
        """
        given = [name for name in CHECKS if getattr(self, name) is not None]
        if given and not self._is_read:
            raise GradRouteError(
                f"A GradRouteGRPOConfig should be given to a trainer that routes. Found one that does not read its "
                f"`{given[0]}`. Fix: GradRouteGRPOTrainer, or GradRouteMixin before your trainer; or a GRPOConfig."
            )
        steps: int = super().get_warmup_steps(num_training_steps)
        return steps

    def __getstate__(self) -> dict[str, Any]:
        # In a file, or as a copy, nobody has read it yet.
        return {**self.__dict__, "_is_read": False}


def check_config_is_read(used: Any, read: GradRouteGRPOConfig | None) -> None:
    """The trainer's `args` say of the routing what was read before it was built; they note that it was.

    Raises:
        GradRouteError: a class between the mixin and TRL's trainer has made another config, of which nothing was read.
    """
    if not isinstance(used, GradRouteGRPOConfig):
        return
    for name in CHECKS:
        value, known = getattr(used, name), getattr(read, name, None)
        if value != known:
            raise GradRouteError(
                f"`args` should be given to the trainer with its `{name}`. Found {known!r} there and {value!r} once it "
                f"was built: a class after GradRouteMixin made another config. Fix: set `{name}` in the `args`."
            )
    used._is_read = True
