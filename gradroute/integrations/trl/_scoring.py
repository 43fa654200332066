"""Scores of rollouts, and log-probabilities in the state in which each was sampled.

    scores                 features of the completion tokens, quarantine ablated, eval mode: as the pairs' were taken
    old and reference      rows that were sampled ablated run ablated, the others with their quarantine

One forward cannot serve both while the quarantine holds something: the features of a row that was sampled with it
differ from those that directions are of. So scores come from a forward of their own, of the backbone without its head.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from gradroute._restore import left_as_found
from gradroute.adapters.views import ablate_quarantine
from gradroute.directions import Capture, capture_activations
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError
from gradroute.integrations.trl._rollouts import loss_mask


class InSampledState:
    """The model, called on chunks of rows in order, each row in the state in which it was sampled."""

    def __init__(self, called: Any, model: nn.Module, ablated: Bool[Tensor, " rows"]) -> None:
        self._called, self._model, self._ablated = called, model, ablated
        self._done = 0

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        rows = self._ablated[self._done : self._done + len(inputs["input_ids"])]
        self._done += len(rows)
        with ablate_quarantine(self._model, rows=rows.to(inputs["input_ids"].device)) if rows.any() else nullcontext():
            return self._called(*args, **inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._called, name)


def captured_rollouts(trainer: Any, rollouts: Mapping[str, Any], directions: Directions) -> tuple[Capture, Tensor]:
    """Features of the rollouts as `directions` reads them, and which rows these are: those with a completion token.

    Completions that were truncated and masked have none. They have no loss either.
    """
    made: Any = directions.provenance
    model = trainer.accelerator.unwrap_model(trainer.model)
    ids = torch.cat([rollouts["prompt_ids"], rollouts["completion_ids"]], dim=1)
    attended = torch.cat([rollouts["prompt_mask"], rollouts["completion_mask"]], dim=1)
    pool = torch.cat([torch.zeros_like(rollouts["prompt_mask"]), loss_mask(rollouts)], dim=1)
    rows = pool.any(1).nonzero().squeeze(1)
    if not len(rows):
        raise GradRouteError(
            "Some rollout should have a completion token to be scored by. Found none: all were truncated, and "
            "mask_truncated_completions hides them. Fix: a longer max_completion_length."
        )
    chunk = rows[:0]

    def chunk_pool(_: Tensor) -> Tensor:
        return pool[chunk]

    backbone = _backbone(model)
    with (
        torch.no_grad(),
        left_as_found(model),
        ablate_quarantine(model),
        trainer.accelerator.autocast(),
        capture_activations(
            model, pool=chunk_pool, features=made.feature, reduction=made.reduction, modules=list(directions.hack)
        ) as capture,
    ):
        for chunk in torch.split(rows, trainer.args.per_device_train_batch_size):
            backbone(input_ids=ids[chunk], attention_mask=attended[chunk], use_cache=False)
    return capture, rows


def _backbone(model: Any) -> nn.Module:
    """The language model without its head; the whole where the head is not set apart."""
    base = model.get_base_model()
    backbone: nn.Module = getattr(base, getattr(base, "base_model_prefix", "") or "", base)
    return backbone
