"""What TRL reports of a run: its metrics and its table of completions, and the paper and tag of its model cards."""

import math
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from jaxtyping import Bool
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from gradroute.adapters.mask import RouteMask
from gradroute.integrations.trl._scoring import loss_mask
from gradroute.integrations.vllm.rows import ablated_rows

NAME = "GRPO with gradient routing"
TAG = "gradient-routing"
# Two papers are cited: gradient routing's, and the one that TRL cites for GRPO.
PAPER = {
    "title": "Gradient Routing: Masking Gradients to Localize Computation in Neural Networks",
    "id": "2410.04332",
    "citation": textwrap.dedent("""\
        @article{cloud2024gradient,
            title        = {{Gradient Routing: Masking Gradients to Localize Computation in Neural Networks}},
            author       = {Alex Cloud and Jacob Goldman-Wetzler and Evžen Wybitul and Joseph Miller and
                            Alexander Matt Turner},
            year         = 2024,
            eprint       = {arXiv:2410.04332},
        }

        """)
    + GRPOTrainer._paper["citation"],
}


@contextmanager
def unlogged(trainer: Any) -> Iterator[None]:
    """A second loss of the same rollouts is no second observation of them."""
    metrics = trainer._metrics
    try:
        trainer._metrics = {mode: defaultdict(list) for mode in metrics}
        yield
    finally:
        trainer._metrics = metrics


def log_rows(
    trainer: Any,
    view: str,
    ablated: Bool[Tensor, " rows"],
    mask: RouteMask | None = None,
    *,
    scores: Tensor | None = None,
    log_ratios: Tensor | None = None,
) -> None:
    """Fill columns of TRL's table of completions; the same ones in training and in evaluation, as a table has to."""
    if "extra" not in trainer._logs:
        return
    rows = len(ablated)
    columns: dict[str, list[Any]] = {"view": ["ablated" if off else view for off in ablated.tolist()]}
    if mask is None:
        columns["zone"] = [""] * rows
    else:
        weights = zip(mask.routed.tolist(), mask.m.tolist(), strict=True)
        columns["zone"] = ["route" if routed else "keep" if m == 0 else "absorb" for routed, m in weights]
    for column, values in (("score", scores), ("log_ratio", log_ratios)):
        columns[column] = [None] * rows if values is None else values.tolist()
    for column, entries in columns.items():
        trainer._logs["extra"][column].extend(gather_object(entries))  # of all processes


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
    difference = (old - sampled).abs()
    # vLLM may leave a token without a log-probability.
    mask = loss_mask(rollouts).bool() & ~difference.isnan()
    off = ablated.to(mask.device)[:, None]
    views = (mask & ~off, mask & off)
    parts, counts = [(difference * rows).nan_to_num().sum() for rows in views], [rows.sum() for rows in views]
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
