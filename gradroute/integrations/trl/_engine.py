"""TRL's vLLM backend with both views of the model in one engine.

    sync        once per step: two adapters, by `EngineViews` (colocate) or `ServerViews` (server)
    generate    each row with the adapter of the view that the model is in: `ablated_fraction`, or an evaluation's view
    at first    assert_engine_follows

    a server    of a prompt's n rows, k ablated: a request for k under one adapter, one for n - k under the other

TRL merges and copies whole weights instead, which an engine cannot ablate for some rows.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer

from gradroute.errors import GradRouteError
from gradroute.evaluation import assert_engine_follows
from gradroute.integrations.trl._requirements import shards
from gradroute.integrations.trl.grpo_config import Options
from gradroute.integrations.vllm import EngineViews, ServerViews, lora_options
from gradroute.integrations.vllm.options import check_version
from gradroute.integrations.vllm.rows import ablated_rows

_Generation: Any = VLLMGeneration
_Client: Any = VLLMClient
_backend: Any = vllm_generation

_PAST_VIEWS = (
    "The engine should be asked through the trainer, which says in which view each row is sampled: without an adapter "
    "the base model answers. Found a call of `{what}`. Fix: trainer.vllm_generation.generate(prompts, None, 1)."
)
_PER_ROW = ("completion_ids", "logprobs", "logprob_token_ids")
# What TRL's own arguments say, or two views need.
_GOVERNED = {
    "distributed_executor_backend": "leave it to TRL",
    "enable_lora": "leave it out: it is on",
    "enable_sleep_mode": "leave it off",
    "gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "logprobs_mode": "leave it to TRL",
    "max_model_len": "vllm_max_model_length",
    "model": "leave it to TRL",
    "model_impl": "vllm_model_impl",
    "tensor_parallel_size": "vllm_tensor_parallel_size",
}
_OF_SERVERS = ("folder", "timeout")
_CHECKED_TOKENS = 8


class AdapterClient(_Client):  # type: ignore[misc]
    """TRL's client of a server: adapters are loaded from files, and each row is sampled by the adapter of its view."""

    model: str
    views: ServerViews
    ablated: Sequence[bool] = ()

    def max_model_len(self) -> int:
        """Tokens of the longest prompt with its completion."""
        return int(self._get(f"{self.base_url}/v1/models")["data"][0]["max_model_len"])

    def init_communicator(self, device: Any = 0) -> None:
        """No weights are sent to the server."""

    def generate(self, prompts: Any, features: None = None, n: int = 1, **sampling: Any) -> dict[str, Any]:
        """TRL's, of `n` rows per prompt, some of them ablated: one request per view and number of rows."""
        if not hasattr(self, "model"):
            raise GradRouteError(
                "`vllm_mode='server'` should speak to vLLM's own server, which knows adapters. Found a trl that speaks "
                "to another one. Fix: trl 1.16 or newer, or vllm_mode='colocate'."
            )
        if len(self.ablated) != n * len(prompts):
            raise GradRouteError(_PAST_VIEWS.format(what="vllm_client.generate"))
        groups: dict[tuple[bool, int], list[int]] = defaultdict(list)
        for i in range(len(prompts)):
            off = sum(self.ablated[i * n : (i + 1) * n])
            for ablated, count in ((True, off), (False, n - off)):
                if count:
                    groups[ablated, count].append(i)
        rows: dict[str, list[Any]] = {name: [None] * (n * len(prompts)) for name in _PER_ROW}
        base = self.model
        try:
            for (ablated, count), chosen in groups.items():
                self.model = self.views.name_of("ablated" if ablated else "on")
                made = super().generate([prompts[i] for i in chosen], features, n=count, **sampling)
                places = [j for i in chosen for j in range(i * n, (i + 1) * n) if self.ablated[j] == ablated]
                for name, values in rows.items():
                    for place, value in zip(places, made[name], strict=True):
                        values[place] = value
        finally:
            self.model = base
        return {"prompt_ids": [list(prompt) for prompt in prompts], **rows}

    def chat(self, *_: Any, **__: Any) -> Any:
        """Refused: TRL's would be answered by the base model."""
        raise GradRouteError(_PAST_VIEWS.format(what="vllm_client.chat"))


class TwoViewGeneration(_Generation):  # type: ignore[misc]
    """TRL's `VLLMGeneration`, which syncs adapters and gives each row that of its view.

    Args:
        args, kwargs: TRL's own.
        engine: arguments of `vllm.LLM` (colocate), or of `ServerViews` (server).
        check: whether `check_once` checks, or its tolerance in nats.
    """

    llm: Any

    def __init__(self, *args: Any, engine: Mapping[str, Any], check: bool | float, **kwargs: Any) -> None:
        self._engine, self._check, self._checked = dict(engine), check, False
        super().__init__(*args, **kwargs)

    def _init_vllm(self) -> None:
        check_version()
        self._check_options()
        self.views: EngineViews | ServerViews | None = None
        if self.mode == "server":
            with _replaced(vllm_generation, "VLLMClient", AdapterClient):
                super()._init_vllm()
            if self.accelerator.is_main_process:
                self.views = ServerViews(self.model, self.vllm_client.base_url, **self._engine)
                self.vllm_client.views = self.views
            return
        folder = self._engine.pop("folder", None)
        make, options = _backend.LLM, lora_options(self.model) | self._engine
        with _replaced(vllm_generation, "LLM", lambda **given: make(**{**given, **options})):
            super()._init_vllm()
        self.views = EngineViews(self.model, self.llm, folder=folder)
        self.llm = _WithViews(self.llm, self)

    def sync_weights(self) -> None:
        """Both views of the model as it is now, in place of merged weights; nothing is sent twice."""
        stale = self.views is not None and not self.views.is_current
        # All processes decide alike: of a sharded model each holds a part, and a sync gathers them.
        if any(gather_object([stale])) and self.views is not None:
            self.views.sync()

    def generate(self, prompts: Any, images: Any, num_generations: int, profiler: Any = None) -> Any:
        """TRL's; each row in the view that the model is in."""
        # TRL asks for a sync where the step has changed. Weights may change without a step.
        self.sync_weights()
        if self.mode == "server":
            flags = gather_object(ablated_rows(self.model, len(prompts)))
            if self.accelerator.is_main_process:
                self.vllm_client.ablated = flags
        try:
            return super().generate(prompts, images, num_generations, profiler)
        finally:
            if self.mode == "server" and self.accelerator.is_main_process:
                self.vllm_client.ablated = ()

    def check_once(self) -> None:
        """At the first call, raise unless the engine follows the model.

        Raises:
            GradRouteError: as `assert_engine_follows`.
        """
        if self._checked or self._check is False:
            return
        options: dict[str, Any] = {"prompts": self._longest_prompt()}
        if self._check is not True:
            options["tolerance"] = self._check
        with self._plain_sampling():
            assert_engine_follows(self.model, self._sampled, **options)
        # Last: an engine that failed it fails it again where training is started again.
        self._checked = True

    def _longest_prompt(self) -> int:
        """More than a block of the prefix cache, where the engine takes so many tokens; the same in all processes."""
        room: list[Any] = [None]
        if self.mode == "colocate":
            room = [self.llm.llm_engine.model_config.max_model_len]
        elif self.accelerator.is_main_process:
            room = [self.vllm_client.max_model_len()]
        return min(160, int(broadcast_object_list(room)[0]) - _CHECKED_TOKENS)

    def _sampled(self, prompts: Sequence[Sequence[int]]) -> tuple[Any, Any]:
        _, ids, logps, _ = self.generate([list(prompt) for prompt in prompts], None, 1)
        return ids, [[first[0] for first in row] for row in logps]

    @contextmanager
    def _plain_sampling(self) -> Iterator[None]:
        """Greedy, a few tokens, without what changes log-probabilities."""
        plain = {
            "temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "logprobs": 0,
            "max_completion_length": _CHECKED_TOKENS, "generation_kwargs": {"ignore_eos": True},
            "structured_outputs_regex": None,
        }  # fmt: skip
        before = {name: getattr(self, name) for name in plain}
        try:
            for name, value in plain.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def _check_options(self) -> None:
        if self.enable_sleep_mode:
            raise GradRouteError(
                "Not with gradient routing: `vllm_enable_sleep_mode=True`. A sleeping engine drops its adapters "
                "and base weights, and was not tried. Fix: leave it off."
            )
        if self.mode == "server":
            unread = [name for name in self._engine if name not in _OF_SERVERS]
            fix = f"one of {', '.join(_OF_SERVERS)}; what the engine is made with is said where the server is started"
        else:
            unread = [name for name in self._engine if name in _GOVERNED]
            fix = "; ".join(f"for {name}: {_GOVERNED[name]}" for name in unread)
        if unread:
            raise GradRouteError(f"`engine` should hold what the engine reads. Found {', '.join(unread)}. Fix: {fix}.")


class _WithViews:
    """TRL's engine in this process: what it samples, it samples with the adapter of each row's view."""

    def __init__(self, llm: Any, generation: TwoViewGeneration) -> None:
        self._llm, self._generation = llm, generation

    def generate(self, prompts: Sequence[Any], **options: Any) -> Any:
        generation, views = self._generation, self._generation.views
        assert isinstance(views, EngineViews)
        group = generation.tp_group if generation.tensor_parallel_size > 1 else None
        requests = views.requests(len(prompts) // generation.tensor_parallel_size, group=group)
        return self._llm.generate(prompts, lora_request=requests, **options)

    def chat(self, *_: Any, **__: Any) -> Any:
        raise GradRouteError(_PAST_VIEWS.format(what="llm.chat"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)


@contextmanager
def two_view_engine(options: Options) -> Iterator[None]:
    """A trainer that is made inside generates by `TwoViewGeneration` where it uses vLLM."""
    made = partial(TwoViewGeneration, engine=options.engine or {}, check=options.engine_check)
    # A trl that makes its backend by another name is no matter where no engine is used; else `check_engine` finds it.
    with _replaced(grpo_trainer, "VLLMGeneration", made) if hasattr(grpo_trainer, "VLLMGeneration") else nullcontext():
        yield


def check_engine(trainer: Any, options: Options) -> None:
    """Raise unless the trainer uses what `two_view_engine` says.

    Raises:
        GradRouteError: `engine` or `engine_check` without vLLM; a trainer that made its backend in another way.
    """
    if not trainer.args.use_vllm:
        for name, given in (("engine", options.engine is not None), ("engine_check", options.engine_check is not True)):
            if given:
                raise GradRouteError(
                    f"`{name}` is read with use_vllm=True. Found use_vllm=False. Fix: set it, or leave `{name}` out."
                )
        return
    if trainer.vllm_mode == "server" and shards(trainer):
        raise GradRouteError(
            "Not with gradient routing: `vllm_mode='server'` with a sharded model, whose blocks all ranks would have "
            "to gather for the one that speaks to the server. Fix: vllm_mode='colocate'."
        )
    backend = getattr(trainer, "vllm_generation", None)
    if not isinstance(backend, TwoViewGeneration):
        raise GradRouteError(
            f"The trainer should generate by gradroute's vLLM backend. Found {type(backend).__name__}: some class made "
            "another one. Fix: leave `vllm_generation` to GRPOTrainer."
        )


@contextmanager
def _replaced(module: Any, name: str, by: Any) -> Iterator[None]:
    if not hasattr(module, name):
        raise GradRouteError(
            f"{module.__name__} should have {name}, which makes TRL's vLLM backend. Found none: vLLM is not installed, "
            "or this trl is another one than gradroute was written for. Fix: pip install vllm; see docs/trl.md."
        )
    before = getattr(module, name)
    setattr(module, name, by)
    try:
        yield
    finally:
        setattr(module, name, before)
