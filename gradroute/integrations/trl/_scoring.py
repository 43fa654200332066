"""Forwards that a step makes without gradients: features for scores, and log-probabilities.

features                   of the completion's tokens, in eval mode, any rows ablated; the backbone without its head
old log-probabilities      rows that were sampled ablated run ablated, the others with their quarantine
of a state                 the same of any rows ablated, in eval mode: for ratios between views
"""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from trl.models.utils import disable_gradient_checkpointing

from gradroute._hashing import known_identity
from gradroute._restore import left_as_found
from gradroute._sharding import ranks_of
from gradroute.adapters.views import ablate_quarantine
from gradroute.directions import Capture
from gradroute.directions.directions import Directions
from gradroute.integrations._rollouts import captured_for


class InSampledState:
    """The model, called on chunks of rows in order, each row in the state in which it was sampled.

    `chunk` is the rows of the call that runs, or ran last.
    """

    def __init__(self, called: Any, model: nn.Module, ablated: Bool[Tensor, " rows"]) -> None:
        self._called, self._model, self._ablated = called, model, ablated
        self._some = bool(ablated.any())
        self.chunk = slice(0, 0)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        ids = inputs["input_ids"]
        self.chunk = slice(self.chunk.stop, self.chunk.stop + len(ids))
        rows = self._ablated[self.chunk].to(ids.device)
        # In chunks without an ablated row too: all of them in one view.
        with ablate_quarantine(self._model, rows=rows) if self._some else nullcontext():
            return self._called(*args, **inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._called, name)


def old_logps(trainer: Any, rollouts: Mapping[str, Any]) -> Tensor:
    """Log-probabilities in the state in which each row was sampled, where TRL would take them from the loss's forward.

    That forward runs under the mask: a kept row (m = 0) that was sampled with its quarantine is off policy in it.
    """
    with disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        return _logps(trainer, rollouts)


def logps_of_state(
    trainer: Any, rollouts: Mapping[str, Any], ablated: Bool[Tensor, " rows"]
) -> Float[Tensor, "rows tokens"]:
    """Log-probabilities of completions, as TRL takes them (its temperature, its autocast) but in eval mode.

    Args:
        trainer: whose model it is.
        rollouts: as TRL made them.
        ablated: the rows that run without the quarantine.
    """
    sampled, trainer._sampled_ablated = trainer._sampled_ablated, ablated
    try:
        with left_as_found(trainer.model):
            return _logps(trainer, rollouts)
    finally:
        trainer._sampled_ablated = sampled


def is_random(model: nn.Module) -> bool:
    """Whether a forward in training mode may draw random numbers: some dropout, or noise of a router, is not zero.

    Layers that call dropout as a function keep its rate in an attribute. What is counted by its name alone costs a
    forward and no more.
    """
    rates = (
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if any(word in name for word in ("drop", "jitter", "noise")) or (name == "p" and isinstance(module, _DropoutNd))
    )
    return any(isinstance(rate, int | float) and not isinstance(rate, bool) and rate > 0 for rate in rates)


def _logps(trainer: Any, rollouts: Mapping[str, Any]) -> Tensor:
    ids, attended = whole_rollouts(rollouts)
    with torch.no_grad():
        logps: Tensor = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            ids,
            attended,
            rollouts["completion_ids"].shape[1],
            batch_size=trainer.args.per_device_train_batch_size,
        )[0]
    return logps


def captured_rollouts(
    trainer: Any, rollouts: Mapping[str, Any], directions: Directions, ablated: Bool[Tensor, " rows"]
) -> tuple[Capture | None, Int[Tensor, " scored"]]:
    """Features of the rollouts as `directions` reads them, and which rows these are: those with a completion token.

    Args:
        trainer: whose model it is.
        rollouts: as TRL made them.
        directions: what is read.
        ablated: the rows that run without the quarantine.

    A completion that was truncated and masked has none, and no loss either. Where no row has any, there is no capture.
    Of a sharded model all ranks run equally many forwards, so that rows without a token run as well there.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    ids, attended = whole_rollouts(rollouts)
    pool = torch.cat([torch.zeros_like(rollouts["prompt_mask"]), loss_mask(rollouts)], dim=1)
    rows, ablated = pool.any(1).nonzero().squeeze(1), ablated.to(pool.device)
    everywhere = bool(ablated.all())
    some = not everywhere and bool(ablated.any())
    together = bool(ranks_of(model.parameters()))
    if not len(rows) and not together:
        return None, rows
    run = torch.arange(len(pool), device=pool.device) if together else rows
    pool = torch.where(pool.any(1, keepdim=True), pool, attended)
    chunk_pool = pool[:0]

    # A sharded model is run from its root, which gathers what is in no group below it.
    called, options = (model, {"logits_to_keep": 1}) if together else (_backbone(model), {})
    takes_positions = "position_ids" in inspect.signature(_backbone(model).forward).parameters
    with (
        torch.no_grad(),
        left_as_found(model),
        ablate_quarantine(model) if everywhere else nullcontext(),
        trainer.accelerator.autocast(),
        captured_for(directions, model, lambda _: chunk_pool) as capture,  # one for all layers: it is looked at once
    ):
        for chunk in torch.split(run, trainer.args.per_device_train_batch_size):
            chunk_pool = pool[chunk]
            places = {"position_ids": positions(attended[chunk])} if takes_positions else {}
            with ablate_quarantine(model, rows=ablated[chunk]) if some else nullcontext():
                called(input_ids=ids[chunk], attention_mask=attended[chunk], use_cache=False, **places, **options)
    if together:
        known_identity(model)  # collective, and read with the scores, which ranks without a row do not have
    if not len(rows):
        return None, rows
    return (capture.take(rows) if len(rows) < len(run) else capture), rows


def whole_rollouts(rollouts: Mapping[str, Any]) -> tuple[Int[Tensor, "rows seq"], Int[Tensor, "rows seq"]]:
    """Prompt and completion in one: token ids, and which of them are attended."""
    ids, attended = (
        torch.cat([rollouts[f"prompt_{each}"], rollouts[f"completion_{each}"]], dim=1) for each in ("ids", "mask")
    )
    return ids, attended


def positions(attended: Int[Tensor, "rows seq"]) -> Int[Tensor, "rows seq"]:
    """0, 1, 2, ... over the attended tokens: absolute positions would otherwise count the padding before a prompt."""
    return (attended.long().cumsum(1) - 1).clamp(min=0)


def loss_mask(rollouts: Mapping[str, Any]) -> Tensor:
    """Completion tokens that the policy sampled: not padding, and not what a tool returned."""
    mask: Tensor = rollouts["completion_mask"]
    return mask * rollouts["tool_mask"] if rollouts.get("tool_mask") is not None else mask


def _backbone(model: Any) -> nn.Module:
    """The language model without its head; the whole model where the head is not set apart."""
    base = model.get_base_model()
    backbone: nn.Module = getattr(base, getattr(base, "base_model_prefix", "") or "", base)
    return backbone
