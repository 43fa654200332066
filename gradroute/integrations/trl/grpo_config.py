"""`GradRouteGRPOConfig`: TRL's config, with those options of the trainer that are values.

    keyword of the trainer     field of the config     what holds
    left out                   left out                the default
    given                      left out                the keyword
    left out                   given                   the field
    given                      given                   both, if they say the same; else an error that names both

A field has the name of its keyword, and None means that it was left out. So the files that hold TRL's options, and the
loggers that report them, have those of the routing too.
"""

import json
from dataclasses import dataclass, field
from typing import Any, cast

from trl.trainer.grpo_config import GRPOConfig

from gradroute.errors import GradRouteError
from gradroute.integrations.trl._options import Options, check_option
from gradroute.integrations.trl._requirements import group_share


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

    directions: str | None = field(
        default=None,
        metadata={
            "help": "File of contrastive pairs (.jsonl or .json), of texts or chat messages, that directions are "
            "extracted from. Left out: the trainer's keyword."
        },
    )
    refresher: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between two extractions of the directions. Left out: they stay as they were."
        },
    )
    log_ratio_gate: float | None = field(
        default=None,
        metadata={
            "help": "Route rollouts whose best prefix the quarantine makes likelier by more than this many nats. Left "
            "out: not asked."
        },
    )
    ablated_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of each group of num_generations that is sampled without the quarantine; a whole number of "
            "rollouts. Left out: 0."
        },
    )
    detector_recall: float | None = field(
        default=None,
        metadata={"help": "Share of all hacks that the detector flags, as far as it is known. Left out: not known."},
    )
    slow_start_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps at the start in which the deployed block has a smaller learning rate. Left out: 0."
        },
    )
    slow_start_fraction: float | None = field(
        default=None,
        metadata={"help": "Fraction of the learning rate in the steps of the slow start. Left out: 0.25."},
    )
    ablated_from: int | None = field(
        default=None,
        metadata={"help": "Optimizer step from which ablated_fraction applies. Left out: once the slow start is over."},
    )
    score_view: str | None = field(
        default=None,
        metadata={
            "help": "With directions, score rollouts with the quarantine ablated, in a forward more (ablated), or each "
            "in the state in which it was sampled, without one (sampled). Left out: ablated.",
            "choices": ["sampled", "ablated"],
        },
    )
    clean_baseline: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the deployed block's advantages are relative to unflagged rollouts. Left out: wherever "
            "something flags rollouts before their backward."
        },
    )
    engine: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "With use_vllm, arguments of vllm.LLM, or of ServerViews for a server; on the command line as JSON."
        },
    )
    engine_check: float | str | None = field(
        default=None,
        metadata={
            "help": "With use_vllm, whether the engine is checked before the first rollout (true or false), or the "
            "tolerance of this check in nats. Left out: true."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self._is_read = False
        if isinstance(self.engine_check, str):
            self.engine_check = _from_command_line(self.engine_check)
        for name in Options.names():
            value = getattr(self, name)
            if value is not None:
                _check_value(name, value)
                check_option(name, value)
        if self.ablated_fraction is not None:
            group_share(self.ablated_fraction, cast("int", self.num_generations))

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """transformers', which every trainer asks for as its training begins.

        Raises:
            GradRouteError: a trainer that does not route, with fields of the routing set.
        """
        given = [name for name in Options.names() if getattr(self, name) is not None]
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


def _from_command_line(text: str) -> Any:
    """`true`, `false` or a number; other text as it is, for the check to name."""
    try:
        return json.loads(text.lower())
    except ValueError:
        return text


def _check_value(name: str, value: Any) -> None:
    try:
        json.dumps(value)
    except TypeError:
        raise GradRouteError(
            f"`{name}` of a GradRouteGRPOConfig should be a value that files of options can hold. Found {value!r}. "
            f"Fix: give it to the trainer, by its keyword `{name}`."
        ) from None


def config_among(*given: Any) -> GradRouteGRPOConfig | None:
    """The config among the arguments of a trainer, if there is one with fields of the routing."""
    return next((each for each in given if isinstance(each, GradRouteGRPOConfig)), None)


def check_config_is_read(used: Any, read: GradRouteGRPOConfig | None) -> None:
    """The trainer's `args` say of the routing what was read before it was built; they note that it was.

    Raises:
        GradRouteError: a class between the mixin and TRL's trainer has made another config, of which nothing was read.
    """
    if not isinstance(used, GradRouteGRPOConfig):
        return
    for name in Options.names():
        value, known = getattr(used, name), getattr(read, name, None)
        if value != known:
            raise GradRouteError(
                f"`args` should be given to the trainer with its `{name}`. Found {known!r} there and {value!r} once it "
                f"was built: a class after GradRouteMixin made another config. Fix: set `{name}` in the `args`."
            )
    used._is_read = True
