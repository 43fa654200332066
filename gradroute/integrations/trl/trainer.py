"""GRPO with routed gradients: TRL's own trainer, in which every rollout carries the mask that it is trained under.

    sample        some rows of each group with the quarantine ablated (`ablated_fraction`), the others with it
    score, flag   quarantine ablated, or as sampled; gate(scores) and detector -> RouteMask -> the rollout dictionary
    explain       log-probabilities in both views; log_ratio_gate -> RouteMask, combined with the other by |
    loss          under the micro-batch's own mask, open until its backward has ended
    step          grad_filter after the last micro-batch, before clipping; refresher after the optimizer
    evaluate      every data set twice: `eval_on_*`, `eval_ablated_*`

TRL shuffles, splits and reuses the dictionary, so that masks stay with their rows.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.grpo_trainer import GRPOTrainer

from gradroute.adapters.route import route
from gradroute.adapters.views import ablate_quarantine
from gradroute.errors import GradRouteError, RouteError
from gradroute.filters import apply_filter
from gradroute.integrations.trl import _logs
from gradroute.integrations.trl import _resume as checkpoint
from gradroute.integrations.trl._engine import check_engine, two_view_engine
from gradroute.integrations.trl._flagging import Flagging, sampled_ablated
from gradroute.integrations.trl._micro_batch import LOG_RATIO, SPLIT, MicroBatch, RowsTwice, put_route
from gradroute.integrations.trl._requirements import check_attributes, check_run, check_trl, shards
from gradroute.integrations.trl._resolve import is_function, resolve
from gradroute.integrations.trl._schedule import Schedule
from gradroute.integrations.trl._scoring import InSampledState
from gradroute.integrations.trl.grpo_config import GradRouteGRPOConfig, Options, check_config_is_read
from gradroute.integrations.trl.routing import Routing, directions_from, pairs_in
from gradroute.optim.slow_start import block_groups

_Trainer: Any = object


class GradRouteMixin(_Trainer):  # type: ignore[misc]
    """Put it before a subclass of TRL's GRPOTrainer: `class Mine(GradRouteMixin, MyGRPOTrainer)`.

    Of a `GradRouteGRPOConfig`, given as `args`, it reads the fields that have the names of its keywords. A keyword and
    a field that differ raise.

    Args:
        gate: from scores or flags to masks: a `BandGate`, `QuantileGate`, `ThresholdGate` or `LabelGate`, or a function
            that makes one of the directions. None: `BandGate(directions)` if there are directions and no
            filter, `LabelGate()` if there is a detector.
        directions: `Directions`; a function of the model that extracts them, called once the model has its blocks; or a
            file of pairs, as for `directions_from`, which gets the trainer's `processing_class`.
        refresher: a `Refresher`, or the optimizer steps between two extractions, where `directions` is a function or a
            file.
        grad_filter: a `ProjectionFilter` or `RolloutFilter`, or a function that makes one of the directions.
        ablated_fraction: of the rollouts of a group; these are sampled without the quarantine, and train the deployed
            block only. None: 0.
        detector: called like a reward function, and like one it may be async; returns a flag per rollout, or with a
            `ThresholdGate` a score, or None where it is undecided. With a gate on directions, a rollout is routed if
            either says so.
        detector_recall: the share of all hacks that the detector flags, as far as it is known. Where rollouts are
            sampled ablated and this is below 0.9 or not known, a warning says what missed hacks do. The model card
            names it.
        log_ratio_gate: a `LogRatioGate`, alone or beside the others: a rollout is routed if either says so. A number is
            its threshold in nats, with the `below` of the gate beside it.
        slow_start_steps: optimizer steps at the start in which the deployed block has a smaller learning rate. None: 0.
        slow_start_fraction: of the learning rate in these steps. None: 0.25.
        ablated_from: the optimizer step from which rollouts are sampled ablated. None: once the slow start is over.
        score_view: with a gate on directions, score rollouts "ablated", in a forward more, or "sampled", each in the
            state in which it was sampled, which costs no forward and gates worse in long runs. None: "ablated".
        clean_baseline: take the deployed block's advantages relative to unflagged rollouts; see
            `clean_baseline_advantages`. None: yes, where something flags rollouts before their backward.
        engine: with `use_vllm=True`, arguments of `vllm.LLM` such as dtype and enforce_eager, and `folder` for the
            adapters' files; for a server, `folder` and `timeout` of `gradroute.integrations.vllm.ServerViews`.
        engine_check: with `use_vllm=True`, whether `assert_engine_follows` checks the engine before the first rollout,
            or its tolerance in nats. None: True.
        args, kwargs: TRL's own.

    What the keywords were resolved to is `trainer.routing`: `gate`, `log_ratio_gate`, `directions`, `refresher`,
    `filter`.

    Raises:
        GradRouteError: a TRL that is not as expected, options that cannot be routed, or arguments that do not fit; in
            `train()`, a run of too few steps for what was asked.
    """

    # For TRL's model card.
    _name = _logs.NAME
    _paper = _logs.PAPER
    _tag_names: list[str]

    def __init__(
        self,
        *args: Any,
        gate: Any = None,
        directions: Any = None,
        refresher: Any = None,
        grad_filter: Any = None,
        ablated_fraction: float | None = None,
        detector: Any = None,
        detector_recall: float | None = None,
        log_ratio_gate: Any = None,
        slow_start_steps: int | None = None,
        slow_start_fraction: float | None = None,
        ablated_from: int | None = None,
        score_view: str | None = None,
        clean_baseline: bool | None = None,
        engine: Mapping[str, Any] | None = None,
        engine_check: bool | float | None = None,
        **kwargs: Any,
    ) -> None:
        check_trl(super())
        self._tag_names = [*self._tag_names, _logs.TAG]  # TRL puts them on the model while it builds the trainer
        given = (*args, *kwargs.values())
        config = next((each for each in given if isinstance(each, GradRouteGRPOConfig)), None)
        options = Options.of(
            config,
            gate=gate,
            grad_filter=grad_filter,
            detector=detector,
            directions=directions,
            refresher=refresher,
            log_ratio_gate=log_ratio_gate,
            ablated_fraction=ablated_fraction,
            detector_recall=detector_recall,
            slow_start_steps=slow_start_steps,
            slow_start_fraction=slow_start_fraction,
            ablated_from=ablated_from,
            score_view=score_view,
            clean_baseline=clean_baseline,
            engine=engine,
            engine_check=engine_check,
        )
        with two_view_engine(options):
            super().__init__(*args, **kwargs)
        check_config_is_read(self.args, config)
        check_attributes(self)
        check_engine(self, options)
        check_run(self, options)
        if isinstance(options.directions, str | Path):
            template = getattr(self.args, "chat_template_kwargs", None)
            pairs = pairs_in(options.directions, self.processing_class, chat_template_kwargs=template)
            options = replace(options, directions=directions_from(pairs, self.processing_class))
        self._options = options
        self._routing: Routing | None = None
        # Before a model is sharded a rank need not hold its weights: those but the main process may have loaded none.
        if not (shards(self) and is_function(options.directions)):
            self._resolve_routing()
        self._schedule = Schedule(self, options)
        self._sampled_ablated: Tensor | None = None  # per row, while rollouts are made
        self._open: ExitStack | None = None  # what a training step closes after its backward
        self._twice: RowsTwice | None = None  # while the losses of a micro-batch are computed
        self._view: str | None = None  # of an evaluation
        self._evaluated: str | None = None  # prefix of the metrics of the data set that is evaluated
        self.add_callback(self._schedule)

    @property
    def routing(self) -> Routing:
        """What the keywords were resolved to.

        Raises:
            GradRouteError: they are not resolved yet.
        """
        if self._routing is None:
            raise GradRouteError(
                "`trainer.routing` should be read after train() has begun: the model is sharded then, and `directions` "
                "are extracted from it. Found that it has not. Fix: read it later, or give Directions that are made."
            )
        return self._routing

    def _resolve_routing(self) -> Routing:
        """Resolve the keywords now, unless they are; on a sharded model all ranks come here together."""
        if self._routing is None:
            routing = resolve(self, self._options)
            self._flagging, self._routing = Flagging(self, routing), routing
        return self._routing

    # Making rollouts

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        training = self.model.training
        first = self.accelerator.process_index * len(inputs)
        routing = self._resolve_routing()
        share = routing.ablated_per_group if training and self._schedule.samples_ablated else 0
        ablated = sampled_ablated(len(inputs), first, self.num_generations, share)
        self._flagging.begin(ablated if training else None)
        self._sampled_ablated = ablated
        try:
            rollouts: dict[str, Any] = super()._generate_and_score_completions(inputs)
            _logs.append_metrics(self, _logs.logp_differences(self, rollouts, ablated if training else None))
            if not training:
                _logs.log_rows(self, self._view or "on", ablated)
                return rollouts
            routed = self._flagging.route(rollouts, ablated)
            put_route(rollouts, routed.mask, routed.scores)
            rollouts |= routed.entries
            log_ratios = routed.entries.get(LOG_RATIO)
            _logs.log_rows(self, "on", ablated, routed.gated, scores=routed.scores, log_ratios=log_ratios)
            _logs.append_metrics(self, routed.figures)
        finally:
            self._sampled_ablated = None
        return rollouts

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm:
            self.vllm_generation.check_once()
        rows = self._sampled_ablated
        ablated: AbstractContextManager[Any] = nullcontext()
        if rows is not None and rows.any():
            ablated = ablate_quarantine(self.model, rows=rows.to(self.accelerator.device))
        with ablated, self._flagging.while_decoding():
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        run = super()._get_per_token_logps_and_entropies
        if self._twice is not None:
            return self._twice.forward(run, model, *args, **kwargs)
        if self._sampled_ablated is None:
            return run(model, *args, **kwargs)
        model = InSampledState(model, self.model, self._sampled_ablated)
        return self._flagging.while_old_logps(run, model, *args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._flagging.see_rewards(rewards)
        rate = self._flagging.detect(inputs, prompts, completions, completion_ids_list)
        if rate is not None:
            _logs.append_metrics(self, {"routing/detector_rate": rate})
        return rewards

    # Training on them

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's; where the deployed block starts slowly, with one block in each group of parameters."""
        makes = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if makes and self._schedule.steps:
            optimizer.param_groups[:] = block_groups(self.model, optimizer.param_groups)
        return optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Forward and backward of one micro-batch under its own mask; filters gradients after the last of a step."""
        with ExitStack() as self._open:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._open = None
        if self.routing.filter is not None and self.accelerator.sync_gradients:
            stats = apply_filter(self.model, self.routing.filter)
            names = ("cin", "cout", "null", "fired")
            _logs.append_metrics(self, {f"routing/filter_{name}": getattr(stats, name) for name in names})
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss; while training, under the route that the rollouts carry."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._open is None:
            raise RouteError(
                "compute_loss should run inside training_step, which keeps the route open until backward has ended. "
                "Fix: override training_step by calling super()."
            )
        copies = 0
        if self.routing.clean_baseline:
            copies = int(self.accelerator.gather(inputs[SPLIT].sum()).max())  # the most that any rank has to run
        batch = MicroBatch.of(inputs, copies)
        if self.routing.by_rollout is not None:
            self._open.enter_context(self.routing.by_rollout.record(self.model))
        self._open.enter_context(route(self.model, batch.mask))
        self._twice = batch.twice
        try:
            loss = super().compute_loss(model, batch.inputs, return_outputs, num_items_in_batch)
            if batch.clean is None:
                return loss
            with _logs.unlogged(self):
                clean = super().compute_loss(model, batch.clean, return_outputs, num_items_in_batch)
        finally:
            self._twice = None
        # The gradient of both. The value that is logged stays that of the rollouts, each counted once.
        return loss + (clean - clean.detach())

    def get_high_entropy_mask(self, entropies: Any, mask: Any, threshold: float) -> Any:
        """TRL's; of rows that run twice the same tokens both times."""
        choose = super().get_high_entropy_mask
        if self._twice is None:
            return choose(entropies, mask, threshold)
        return self._twice.tokens(lambda: choose(entropies, mask, threshold))

    # Evaluation and logs

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate on and ablated; metrics `<prefix>_on_*` and `<prefix>_ablated_*`."""
        if self._view is None:
            metrics: dict[str, float] = {}
            for view in ("on", "ablated"):
                try:
                    self._view = view
                    with ablate_quarantine(self.model) if view == "ablated" else nullcontext():
                        metrics |= self.evaluate(eval_dataset, ignore_keys, f"{metric_key_prefix}_{view}")
                finally:
                    self._view = None
            return metrics
        outer, self._evaluated = self._evaluated, metric_key_prefix
        try:
            return dict(super().evaluate(eval_dataset, ignore_keys, metric_key_prefix))
        finally:
            self._evaluated = outer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, but that metrics of an evaluation go under the prefix of their view and data set."""
        if self._evaluated is not None and not self.model.training:
            logs |= _logs.taken_eval_metrics(self, self._evaluated)
        writes = self.log_completions and self.accelerator.is_main_process
        with _logs.own_table(self, self._evaluated) if self._evaluated is not None and writes else nullcontext():
            super().log(logs, start_time)

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if not self.args.save_only_model:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            checkpoint.save(folder, self, self.routing)

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        # First, because torch would not say which keyword differs where groups of parameters do.
        if checkpoint_folder is not None:
            checkpoint.load(Path(checkpoint_folder), self, self._resolve_routing())
        super()._load_optimizer_and_scheduler(checkpoint_folder)


class GradRouteGRPOTrainer(GradRouteMixin, GRPOTrainer):
    """TRL's `GRPOTrainer` with the keywords of `GradRouteMixin`."""
