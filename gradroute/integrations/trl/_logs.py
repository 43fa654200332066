"""TRL's metrics and its table of completions: what goes into them, and what is kept out."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from gradroute.adapters.mask import RouteMask
from gradroute.integrations.vllm.rows import ablated_rows


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
    weights = zip(mask.routed.tolist(), mask.m.tolist(), strict=True)
    zones = ["route" if routed else "keep" if m == 0 else "absorb" for routed, m in weights]
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


def logp_differences(
    trainer: Any, rollouts: Mapping[str, Any], ablated: Bool[Tensor, " rows"] | None
) -> dict[str, float]:
    """Mean |log p_trainer - log p_engine| over the tokens of rows that were sampled on, and ablated; all processes'.

    Args:
        trainer: that made the rollouts.
        rollouts: as TRL made them.
        ablated: the rows that were sampled so; None: those of the view that the model is in now.
    """
    old, sampled = rollouts.get("old_per_token_logps"), rollouts.get("sampling_per_token_logps")
    if not trainer.use_vllm or old is None or sampled is None:
        return {}
    if ablated is None:
        ablated = torch.tensor(ablated_rows(trainer.model, len(old)))
    mask = rollouts["completion_mask"].bool()
    if "tool_mask" in rollouts:
        mask = mask & rollouts["tool_mask"].bool()
    difference = (old - sampled).abs()
    # vLLM may leave a token without a log-probability.
    mask = mask & ~difference.isnan()
    off = ablated.to(mask.device)[:, None]
    parts = [(difference * rows).nan_to_num().sum() for rows in (mask & ~off, mask & off)]
    counts = [rows.sum() for rows in (mask & ~off, mask & off)]
    figures = torch.stack([torch.stack(parts).double(), torch.stack(counts).double()])
    sums, numbers = trainer.accelerator.gather(figures[None]).sum(0).tolist()
    names = ("sampling/logp_difference_on", "sampling/logp_difference_ablated")
    return {name: part / count for name, part, count in zip(names, sums, numbers, strict=True) if count}


def append_metrics(trainer: Any, figures: Mapping[str, float]) -> None:
    """Add figures to those of which TRL logs the means, of training or of an evaluation."""
    for name, value in figures.items():
        trainer._metrics["train" if trainer.model.training else "eval"][name].append(value)


def taken_eval_metrics(trainer: Any, prefix: str) -> dict[str, Any]:
    """The means of an evaluation's figures under a prefix, taken away from TRL, which calls all of them eval_*."""
    taken: dict[str, Any] = {}
    for name, values in trainer._metrics["eval"].items():
        valid = [value for value in values if not math.isnan(value)]
        taken[f"{prefix}_{name}"] = sum(valid) / len(valid) if valid else None
    trainer._metrics["eval"].clear()
    return taken
