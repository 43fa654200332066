"""TRL's metrics and its table of completions: what goes into them, and what is kept out."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxtyping import Bool
from torch import Tensor

from gradroute.adapters.mask import RouteMask


class DiscardedMetrics(dict[str, list[float]]):
    """Metrics that are not kept: lists that nothing holds on to."""

    def __missing__(self, _: str) -> list[float]:
        return []


@contextmanager
def unlogged(trainer: Any) -> Iterator[None]:
    """A second loss of the same rollouts is no second observation of them."""
    metrics = trainer._metrics
    try:
        trainer._metrics = {mode: DiscardedMetrics() for mode in metrics}
        yield
    finally:
        trainer._metrics = metrics


def rollout_table(
    rows: int,
    view: str,
    *,
    mask: RouteMask | None = None,
    scores: Tensor | None = None,
    log_ratios: Tensor | None = None,
    ablated: Bool[Tensor, " rows"] | None = None,
) -> dict[str, list[Any]]:
    """Columns for TRL's table of completions; the same ones in training and in evaluation, as a table has to have."""
    if mask is None or ablated is None:
        return {"view": [view] * rows, "zone": [""] * rows, "score": [None] * rows, "log_ratio": [None] * rows}
    zones = ["route" if r else "keep" if m == 0 else "absorb" for r, m in zip(mask.routed, mask.m, strict=True)]
    columns: dict[str, list[Any]] = {"view": ["ablated" if off else view for off in ablated.tolist()], "zone": zones}
    for column, values in (("score", scores), ("log_ratio", log_ratios)):
        columns[column] = [None] * rows if values is None else values.tolist()
    return columns


@contextmanager
def own_table(trainer: Any, name: str) -> Iterator[None]:
    """The table of completions that TRL writes inside gets `name` into its file name.

    TRL names tables by step alone: an evaluation's table would replace the one of training, and one view's the other's.
    """
    table = Path(trainer.args.output_dir) / "completions" / f"completions_{trainer.state.global_step:05d}.parquet"
    aside = table.with_suffix(".aside")
    had_one = table.is_file()
    if had_one:
        table.replace(aside)
    try:
        yield
        if table.is_file():
            table.replace(table.with_stem(f"{table.stem}_{name}"))
    finally:
        if had_one:
            aside.replace(table)
