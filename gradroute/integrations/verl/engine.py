"""verl's FSDP2 engine with a quarantine: each rollout is scored in the log-prob pass and trained under its own mask.

    LoRA          QuarantineLoraConfig, both blocks in one adapter
    log-prob      features of the pass itself, adapters on -> scores -> gate, on the rows of all ranks -> columns
    reference     adapters off: scores nothing
    update        route(mask of the micro-batch) around its forward and backward
    step          refresher, where a step was taken
    sync          one view, as plain LoRA or merged

verl shuffles and splits the columns with the rows they belong to.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.fs import copy_to_local
from verl.utils.fsdp_utils import normalize_peft_param_name
from verl.utils.model import convert_weight_keys
from verl.utils.py_functional import convert_to_regular_types
from verl.workers.engine import FSDPEngineWithLMHead

from gradroute._restore import left_as_found
from gradroute.adapters.mask import RouteMask
from gradroute.adapters.peft.checkpoint import inject_blocks
from gradroute.adapters.peft.config import QuarantineLoraConfig
from gradroute.adapters.route import route
from gradroute.adapters.views import ablate_quarantine, disable_adapters
from gradroute.directions import capture_activations
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError, RouteError
from gradroute.integrations.verl import _saved_state as checkpoint
from gradroute.integrations.verl._engine_settings import check_engine, check_verl
from gradroute.integrations.verl._rows import SCORE, columns_of, flat, mask_of, nested, of_tokens, pool_of
from gradroute.integrations.verl._weights import merged_weights, plain_adapter
from gradroute.integrations.verl.settings import RoutingSettings
from gradroute.refresh.refresher import Refresher

check_verl(FSDPEngineWithLMHead)


class RoutedFSDPEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """verl makes it, with verl's own arguments; `register` says by what it routes."""

    routing: ClassVar[RoutingSettings]
    directions: Directions
    gate: Any  # a Gate that reads scores
    refresher: Refresher | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_engine(self)
        self._open: ExitStack | None = None  # while a micro-batch runs forward and backward
        self._adapters_off = False  # in the reference pass

    def initialize(self) -> None:
        """Build model and optimizer; then extract directions, and make gate and refresher of them."""
        super().initialize()
        with self.eval_mode(), ablate_quarantine(self.module), left_as_found(self.module):
            self.directions = self._extracted()
        self.gate = self.routing.made_gate(self.directions)
        self.refresher, every = None, self.routing.refresh_every
        if every is not None:
            self.refresher = Refresher(self.directions, self._extracted, model=self.module, every=every)
            self._watch = self.refresher.watch(
                self.optimizer, *([self.gate] if self.gate.directions is not None else [])
            )

    def _build_lora_module(self, module: Any) -> Any:
        module.enable_input_require_grads()
        model = self.model_config
        options = ("target_modules", "target_parameters", "exclude_modules")
        config = QuarantineLoraConfig(
            task_type="CAUSAL_LM",
            r=model.lora_rank,
            lora_alpha=model.lora_alpha,
            r_quarantine=self.routing.r_quarantine,
            **{name: convert_to_regular_types(getattr(model, name)) for name in options},
        )
        path = model.lora_adapter_path
        return inject_blocks(module, config, None if path is None else copy_to_local(path, use_shm=model.use_shm))

    def _extracted(self) -> Directions:
        with self._autocast():
            return self.routing.made_directions(self.module, self.model_config.tokenizer)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device_type=get_device_name(), dtype=self._autocast_dtype)

    # The log-prob pass

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """For the reference pass: both blocks off, and nothing is scored."""
        self._adapters_off = True
        try:
            with disable_adapters(self.module):
                yield
        finally:
            self._adapters_off = False

    def infer_batch(self, data: Any, loss_function: Any = None) -> Any:
        """verl's; where rollouts were scored, with the columns of their routes beside the log-probabilities."""
        output = super().infer_batch(data, loss_function)
        found = output["model_output"]
        if SCORE in found:
            scores = flat(found.pop(SCORE))
            found |= columns_of(self._gated(scores), scores)
        return output

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        """verl's: under the route of the micro-batch while training, scored in a log-prob pass with adapters on."""
        packed = tu.get_non_tensor_data(data=micro_batch, key="use_remove_padding", default=True)
        if not forward_only:
            micro_batch = micro_batch.to(get_device_id())
            mask = mask_of(micro_batch)
            self._route_open().enter_context(route(self.module, of_tokens(mask, micro_batch) if packed else mask))
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
            output["metrics"]["routing/routed"] = float(mask.routed.float().mean())
            return loss, output
        if loss_function is not None or self._adapters_off:
            return super().forward_step(micro_batch, loss_function, forward_only)
        pool, known = pool_of(micro_batch.to(get_device_id()), packed=packed)
        provenance: Any = self.directions.provenance
        with capture_activations(
            self.module,
            pool=pool,
            features=provenance.feature,
            reduction=provenance.reduction,
            modules=list(self.directions.hack),
        ) as features:
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        # With the quarantine on, as rollouts are sampled. In long runs that gates worse than a separate ablated pass.
        scores = self.directions.score(features, view="on").masked_fill(~known, math.nan)
        output["model_output"][SCORE] = nested(scores)
        return loss, output

    def _gated(self, scores: Tensor) -> RouteMask:
        """The mask of these rows, from one call of the gate on the rows of all ranks, so that it is the same gate."""
        group = self.get_data_parallel_group()
        ranks: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(ranks, scores.cpu(), group)
        every = torch.cat(ranks)
        known = (~every.isnan()).nonzero().squeeze(1)
        # A row of which nothing is known has no loss either: it absorbs.
        weights = [torch.ones_like(every) for _ in range(3)]
        if len(known):
            mask = self.gate(every[known])
            weights = [
                each.index_copy(0, known, part.to(each)) for each, part in zip(weights, _parts(mask), strict=True)
            ]
        first = sum(len(each) for each in ranks[: dist.get_rank(group)])
        rows = slice(first, first + len(scores))
        return RouteMask(*(each[rows].to(scores.device) for each in weights))

    # The update

    @contextmanager
    def _gradient_sync_context(self, *, is_last_micro_batch: bool) -> Iterator[None]:
        # verl opens it around forward and backward of one micro-batch.
        try:
            with ExitStack() as self._open, super()._gradient_sync_context(is_last_micro_batch=is_last_micro_batch):
                yield
        finally:
            self._open = None

    def _route_open(self) -> ExitStack:
        if self.routing.rollouts == "ablated":
            raise RouteError(
                "Rollouts that are sampled ablated should not be trained on: no row would train the quarantine. Fix: "
                'rollouts="on", or trainer.val_only=True.'
            )
        if self._open is None:
            raise RouteError(
                "forward_step should run inside forward_backward_batch, which keeps the route open until backward has "
                "ended. Fix: train by train_batch."
            )
        return self._open

    def optimizer_step(self) -> float:
        """verl's, and after a step that was taken the refresher's."""
        norm = float(super().optimizer_step())
        # verl takes no step where the norm is not finite; if it did, the watch would say so.
        if self.refresher is not None and math.isfinite(norm):
            self.refresher.step()
        return norm

    def train_batch(self, data: Any, loss_function: Any) -> Any:
        """verl's, with figures of the refreshes for its log."""
        outputs = super().train_batch(data, loss_function)
        if self.refresher is not None:
            reports = self.refresher.reports
            figures: dict[str, float] = {"age": self.refresher.age, "refreshes": len(reports)}
            if reports:
                figures |= {"overlap": reports[-1].overlap, "largest_angle": reports[-1].largest_angle}
            outputs["metrics"] |= {f"routing/{name}": [float(value)] for name, value in figures.items()}
        return outputs

    # Weights for the rollouts

    def get_per_tensor_param(
        self, layered_summon: bool = False, base_sync_done: bool | None = None, **kwargs: Any
    ) -> Any:
        """verl's, but that the adapter is plain LoRA of the view that is sampled from, and merging copies no weight.

        Raises:
            GradRouteError: an adapter that the rollouts' engine has no room for, or would not be sent.
        """
        view, lora = self.routing.rollouts, self.model_config.lora
        if lora.get("merge", False):
            state = self.module.state_dict()
            plain = convert_weight_keys(normalize_peft_param_name({name: name for name in state}), self.module)
            names = {found_as: name for name, found_as in plain.items()}
            return merged_weights(self.module, names, view, get_device_id()), None
        if base_sync_done is None:
            raise GradRouteError(
                "A checkpoint engine would send the base model without its blocks. Fix: "
                "actor_rollout_ref.model.lora.merge=True, or checkpoint_engine.backend=naive."
            )
        params, config = super().get_per_tensor_param(layered_summon, base_sync_done, **kwargs)
        if not base_sync_done:
            return params, config
        tensors, config = plain_adapter(self.module, dict(params), config, view)
        room = max(lora.get("rank", 0), 0) or self.model_config.lora_rank
        if config["r"] > room:
            raise GradRouteError(
                f"The rollouts' engine should have room for adapters of rank {config['r']}, which both blocks are "
                f"sent as. Found {room}. Fix: actor_rollout_ref.model.lora.rank={config['r']} (model.lora_rank stays "
                "the rank of the deployed block), or model.lora.merge=True."
            )
        return tensors.items(), config

    def get_per_tensor_param_shard(self, **kwargs: Any) -> Any:  # noqa: ARG002
        """Raises: what verl sends by shards has no adapters."""
        raise GradRouteError(
            "checkpoint_engine.backend=delta_sharded would send the base model without its blocks. Fix: naive."
        )

    # Checkpoints

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's, with directions, gate and refresher in `gradroute/`."""
        super().save_checkpoint(local_path, *args, **kwargs)
        if local_path is not None:
            checkpoint.save(local_path, self)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's, and then directions, gate and refresher as they were saved."""
        super().load_checkpoint(local_path, *args, **kwargs)
        if local_path is not None:
            checkpoint.load(local_path, self)


def _parts(mask: RouteMask) -> tuple[Tensor, Tensor, Tensor]:
    return mask.m, mask.g_d, mask.g_q
