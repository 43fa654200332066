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
from verl.utils.torch_dtypes import PrecisionType
from verl.workers.engine import FSDPEngineWithLMHead

from gradroute._restore import left_as_found
from gradroute.adapters.mask import RouteMask
from gradroute.adapters.peft.checkpoint import inject_blocks
from gradroute.adapters.peft.config import QuarantineLoraConfig
from gradroute.adapters.route import route
from gradroute.adapters.views import ablate_quarantine, disable_adapters
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError, RouteError
from gradroute.integrations._rollouts import captured_for, gated_rows
from gradroute.integrations.verl import _saved_state as checkpoint
from gradroute.integrations.verl._rows import SCORE, columns_of, flat, mask_of, nested, of_tokens, pool_of
from gradroute.integrations.verl._weights import merged_weights, plain_adapter
from gradroute.integrations.verl.settings import RoutingSettings
from gradroute.refresh.refresher import Refresher

_NEEDED = ("_gradient_sync_context", "_build_lora_module", "forward_step", "optimizer_step", "infer_batch")
_MISSING = [name for name in _NEEDED if not hasattr(FSDPEngineWithLMHead, name)]
if _MISSING:
    raise GradRouteError(f"verl's FSDP engine should have {_MISSING}, as in 0.9.1. Fix: pip install verl==0.9.1.")


class RoutedFSDPEngine(FSDPEngineWithLMHead):  # type: ignore[misc]
    """verl makes it, with verl's own arguments; `register` says by what it routes."""

    routing: ClassVar[RoutingSettings]
    directions: Directions
    gate: Any  # a Gate that reads scores
    refresher: Refresher | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_settings(self)
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
        with captured_for(self.directions, self.module, pool) as features:
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
        # A row of which nothing is known has no loss either.
        mask = gated_rows(len(every), known, lambda: self.gate(every[known]))
        first = sum(len(each) for each in ranks[: dist.get_rank(group)])
        return mask[first : first + len(scores)]

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


def _check_settings(engine: Any) -> None:
    """Raise for settings under which something that was asked for would not happen.

    Raises:
        GradRouteError: such a setting.
    """
    model, config = engine.model_config, engine.engine_config
    refused = {
        "no LoRA (model.lora_rank=0), so that there are no blocks. Fix: model.lora_rank=16.": model.lora_rank <= 0,
        "a model that is not trained (forward_only), such as a separate reference model. Fix: use the model without "
        "its adapters as the reference, as verl does with model.lora_rank.": config.forward_only,
        "ulysses_sequence_parallel_size > 1: a rank has parts of rollouts only, and no features of them. Fix: "
        "ulysses_sequence_parallel_size=1.": config.ulysses_sequence_parallel_size > 1,
        "pad_to_length=True: a packed batch has tokens of no rollout. Fix: pad_to_length=False.": config.pad_to_length,
        "offload_policy=True: blocks that are on the CPU cannot be gathered. Fix: param_offload=True.": (
            config.offload_policy
        ),
        "QAT, which replaces linears by other layers. Fix: leave qat off.": engine._qat_enabled,
        "activation offloading, under which routed layers were not tested. Fix: "
        "model.enable_activation_offload=False.": model.enable_activation_offload,
        "fp16, whose gradient scaler may skip a step unseen. Fix: mixed_precision.param_dtype=bf16.": (
            PrecisionType.is_fp16((config.mixed_precision or {}).get("param_dtype", "bf16"))
        ),
    }
    found = [why for why, holds in refused.items() if holds]
    if found:
        raise GradRouteError(f"A routed engine cannot work with every setting of verl. Found {found[0]}")
