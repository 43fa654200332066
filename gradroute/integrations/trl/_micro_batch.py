"""A micro-batch of rollouts under its masks, in which rows that train on two advantages run twice in one forward.

    forward   n rows (split rows: g_d = 0), then k copies of rows (g_q = 0, and g_d = 0 where the row is not split)
    loss      L(a; log p of the n rows) + L(b; log p of the copies of split rows, the other rows constant)

Both terms are TRL's own loss of all n rows: they divide, clip and choose tokens alike, whatever the type of loss, and
copies change none of it. k is the same on every rank, so that all ranks run forwards of one shape and join the same
gathers; a copy of a row that is not split is in neither loss.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gradroute.adapters.mask import RouteMask
from gradroute.errors import RouteError

# What rides in TRL's dictionary of rollouts, whose tensors are shuffled and split together.
M, G_D, G_Q = "route_m", "route_g_d", "route_g_q"
CLEAN, SPLIT, SCORE = "route_clean_advantages", "route_split", "route_score"
LOG_RATIO = "route_log_ratio"
_ROUTE = (M, G_D, G_Q, CLEAN, SPLIT, SCORE, LOG_RATIO)


def put_route(rollouts: dict[str, Any], mask: RouteMask, scores: Tensor | None) -> None:
    """Write a row's mask and score into TRL's dictionary."""
    rollouts |= {M: mask.m, G_D: mask.g_d, G_Q: mask.g_q}
    if scores is not None:
        rollouts[SCORE] = scores


def split_rows(inputs: Mapping[str, Any]) -> Int[Tensor, ""]:
    """How many rows of a micro-batch train on two advantages that one loss cannot carry."""
    count: Tensor = inputs[SPLIT].sum()
    return count


class RowsTwice:
    """Copies of rows in the forward of the rows themselves, and which log-probabilities each of the two losses sees.

    Args:
        rows: the row of each copy.
        split: whether that row is split; if not, the copy only keeps this rank in step with the others.
    """

    def __init__(self, rows: Int[Tensor, " copies"], split: Bool[Tensor, " copies"]) -> None:
        self.rows, self.split = rows, split
        self._found: tuple[Any, ...] | None = None
        self._tokens: Tensor | None = None
        self._size = 0

    def forward(self, run: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """For the first loss, `run` on rows and copies, and what it found of the rows; for the second, of the copies.

        Args:
            run: TRL's log-probabilities and entropies.
            model, args, kwargs: its arguments, of n rows.
        """
        if self._found is None:
            self._size = len(args[0] if args else kwargs["input_ids"])
            again = {key: self._with_copies(value) for key, value in kwargs.items()}
            self._found = tuple(run(model, *map(self._with_copies, args), **again))
            return tuple(each[: self._size] if self._is_per_row(each) else each for each in self._found)
        return tuple(self._of_copies(each) for each in self._found)

    def tokens(self, choose: Callable[[], Tensor]) -> Tensor:
        """The tokens that the loss counts: chosen for the first loss, the same ones for the second."""
        if self._tokens is None:
            self._tokens = choose()
        return self._tokens

    def _with_copies(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.shape[:1] == (self._size,):
            return torch.cat([value, value[self.rows]])
        return value

    def _is_per_row(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape[:1] == (self._size + len(self.rows),)

    def _of_copies(self, value: Any) -> Any:
        if not self._is_per_row(value):
            return value
        constant = value[: self._size].detach()
        split = self.split.view(-1, *[1] * (value.ndim - 1))
        return constant.index_copy(0, self.rows, torch.where(split, value[self._size :], constant[self.rows]))


@dataclass(frozen=True)
class MicroBatch:
    """The inputs and the mask of one micro-batch.

    Args:
        inputs: TRL's own entries.
        mask: of its rows, then of their copies.
        twice: the copies; None where no row runs twice.
        clean: TRL's own entries for the second loss.
    """

    inputs: dict[str, Any]
    mask: RouteMask
    twice: RowsTwice | None = None
    clean: dict[str, Any] | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any], copies: int = 0) -> "MicroBatch":
        """Take the route out of a micro-batch of rollouts.

        Args:
            inputs: what TRL gives to `compute_loss`.
            copies: how many rows run twice, the most that any rank has to; split rows first.

        Raises:
            RouteError: the rollouts carry no route.
        """
        if any(key not in inputs for key in (M, G_D, G_Q)):
            raise RouteError(
                "A micro-batch of rollouts should carry its route. Found none: it was not made by this trainer's "
                "_generate_and_score_completions. Fix: override that method by calling super()."
            )
        own = {key: value for key, value in inputs.items() if key not in _ROUTE}
        mask = RouteMask.weights(inputs[M], inputs[G_D], inputs[G_Q])
        if not copies:
            return cls(own, mask)
        split = inputs[SPLIT]
        rows = split.long().argsort(descending=True, stable=True)[:copies]
        twice = RowsTwice(rows, split[rows])
        mask = RouteMask.weights(
            torch.cat([mask.m, mask.m[rows]]),
            torch.cat([mask.g_d.masked_fill(split, 0.0), mask.g_d[rows].masked_fill(~twice.split, 0.0)]),
            torch.cat([mask.g_q, torch.zeros_like(mask.g_q[rows])]),
        )
        return cls(own, mask, twice, {**own, "advantages": inputs[CLEAN]})
