"""verl's batches without padding, as gradroute reads them: weights over tokens, masks, columns of the batch.

input_ids   nested (rows, j)     packed   (1, tokens)       padded   (rows, seq)
pool        1 at the tokens of the loss mask, which ends where its row ends
columns     the weights of the rollout's RouteMask and its score, nested (rows, 1): verl splits and shuffles them
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from gradroute.adapters.mask import RouteMask
from gradroute.errors import RouteError

SCORE = "gradroute_score"
_WEIGHTS = ("gradroute_m", "gradroute_g_d", "gradroute_g_q")


def pool_of(
    micro_batch: Mapping[str, Any], *, packed: bool
) -> tuple[Shaped[Tensor, "rows tokens"], Bool[Tensor, " rows"]]:
    """Weights over the tokens of each row, and which rows have a token of their own to score.

    A row without one (verl fills batches up with such rows) gets its last token instead, so that every row has a place.
    """
    offsets = micro_batch["input_ids"].offsets()
    lengths = offsets.diff()
    loss = _last_tokens(micro_batch["loss_mask"], lengths)
    known = loss.any(1)
    loss[~known, -1] = 1
    # Each row ends at the right of `loss`; the packed or padded batch has its tokens at `start + position`.
    rows, places = loss.nonzero(as_tuple=True)
    positions = places - loss.shape[1] + lengths[rows]
    start = offsets[:-1][rows] if packed else torch.zeros_like(positions)
    pool = loss.new_zeros(len(lengths), int(offsets[-1]) if packed else int(lengths.max()))
    pool[rows, start + positions] = loss[rows, places]
    return pool, known


def _last_tokens(loss_mask: Any, lengths: Int[Tensor, " rows"]) -> Shaped[Tensor, "rows last"]:
    """The loss mask, aligned on the right."""
    if not loss_mask.is_nested:
        raise RouteError(
            f"`loss_mask` should be nested, a row per rollout. Found a tensor of shape {tuple(loss_mask.shape)}: a "
            "padded batch, as of verl's old trainer. Fix: trainer.use_v1=True."
        )
    found = loss_mask.offsets().diff()
    if (found > lengths).any():
        raise RouteError("`loss_mask` should not be longer than its `input_ids`. Found a row where it is.")
    width = int(found.max())
    values = torch.zeros(len(found), width, dtype=torch.float32, device=loss_mask.device)
    inside = torch.arange(width, device=loss_mask.device) >= width - found[:, None]
    values[inside] = loss_mask.values().to(values.dtype)
    return values


def nested(values: Float[Tensor, " rows"]) -> Tensor:
    """(rows, 1), nested as verl keeps what it puts together from micro-batches."""
    return torch.nested.nested_tensor_from_jagged(values, torch.arange(len(values) + 1, device=values.device))


def flat(column: Tensor) -> Float[Tensor, " rows"]:
    """The values of a column, however verl has kept it on the way."""
    return (column.values() if column.is_nested else column).reshape(-1)


def columns_of(mask: RouteMask, scores: Float[Tensor, " rows"]) -> dict[str, Tensor]:
    """Columns of the batch: three weights and a score per row."""
    weights = dict(zip(_WEIGHTS, (mask.m, mask.g_d, mask.g_q), strict=True))
    return {name: nested(values.to(scores)) for name, values in weights.items()} | {SCORE: nested(scores)}


def mask_of(micro_batch: Mapping[str, Any]) -> RouteMask:
    """The mask that the rollouts of a micro-batch carry, a row for each.

    Raises:
        RouteError: they carry none.
    """
    missing = [name for name in _WEIGHTS if name not in micro_batch]
    if missing:
        raise RouteError(
            f"Each rollout should carry its route. Found a micro-batch without {missing}: it was not scored in a "
            "log-prob pass of this engine, or the columns were dropped. Fix: trainer.use_v1=True, without "
            "algorithm.rollout_correction.bypass_mode."
        )
    weights = [flat(micro_batch[name]) for name in _WEIGHTS]
    rows = len(micro_batch["input_ids"].offsets()) - 1
    if any(len(each) != rows for each in weights):
        raise RouteError(f"Each rollout should carry one route. Found {len(weights[0])} for {rows} rollouts.")
    return RouteMask(*weights)


def of_tokens(mask: RouteMask, micro_batch: Mapping[str, Any]) -> RouteMask:
    """A mask of rows, for the tokens of the batch that they are packed into."""
    lengths = micro_batch["input_ids"].offsets().diff()
    return RouteMask(*(each.repeat_interleave(lengths)[None] for each in (mask.m, mask.g_d, mask.g_q)))
