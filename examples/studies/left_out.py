"""AUROC of pairs that directions were not made from, by how the directions were made and which pairs were left out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import gradroute as gr

Split = tuple[list[int], list[int]]
Fit = Callable[[list[int], list[int]], tuple[Tensor, Tensor]]
"""(kept pairs, left-out pairs) -> scores of the hack and of the clean sides of the latter."""


def fitted(directions: gr.Directions, estimator: gr.directions.estimators.Estimator, *, swap: bool = False) -> Fit:
    """Directions from the kept pairs; `swap` exchanges the sides of half of them first."""

    def scores(kept: list[int], left_out: list[int]) -> tuple[Tensor, Tensor]:
        hack, clean = ({n: f[kept] for n, f in side.items()} for side in (directions.hack, directions.clean))
        if swap:
            order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(sum(left_out)))
            swapped = (order < len(kept) // 2)[:, None]
            hack, clean = (
                {n: torch.where(swapped, f, side[n]) for n, f in other.items()}
                for side, other in ((hack, clean), (clean, hack))
            )
        made = estimator(hack, clean)
        hack, clean = (
            made.score({n: f[left_out] for n, f in side.items()}) for side in (directions.hack, directions.clean)
        )
        return hack, clean

    return scores


def random(directions: gr.Directions, seed: int) -> Fit:
    """A Haar draw: a unit row per module, each with the sign that scores hacks of the kept pairs higher."""
    rows = directions.random_like(seed).rows
    hack, clean = (
        torch.stack([side[n] @ v[0] for n, v in rows.items()]) for side in (directions.hack, directions.clean)
    )

    def scores(kept: list[int], left_out: list[int]) -> tuple[Tensor, Tensor]:
        sign = (hack[:, kept] - clean[:, kept]).mean(1).sign()
        return sign @ hack[:, left_out], sign @ clean[:, left_out]

    return scores


def beats(fit: Fit, splits: Sequence[Split], n: int) -> Tensor:
    """(n, n): how often hack side i scored above clean side j, of the splits that leave out both; nan if none does."""
    wins, counted = torch.zeros(n, n), torch.zeros(n, n)
    for kept, left_out in splits:
        hack, clean = fit(kept, left_out)
        place = torch.tensor(left_out)
        difference = hack[:, None] - clean[None, :]
        wins[place[:, None], place] += (difference > 0).float() + 0.5 * (difference == 0).float()
        counted[place[:, None], place] += 1
    return wins / counted


def auroc(tables: Sequence[Tensor], categories: Sequence[str], resamples: int = 2000) -> dict[str, Any]:
    """The mean of `beats` with a 95 % interval from resampling pairs within categories; of several draws, of each."""
    values = [round(table.nanmean().item(), 4) for table in tables]
    if len(values) > 1:
        return {"auroc": round(sum(values) / len(values), 4), "draws": values}
    generator, index = torch.Generator().manual_seed(0), []
    for name in dict.fromkeys(categories):
        own = torch.tensor([i for i, c in enumerate(categories) if c == name])
        index.append(own[torch.randint(len(own), (resamples, len(own)), generator=generator)])
    means = torch.stack([tables[0][i[:, None], i].nanmean() for i in torch.cat(index, dim=1)])
    low, high = means.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"auroc": values[0], "low": round(low, 4), "high": round(high, 4)}


def splits_of(categories: Sequence[str], folds: int, repeats: int) -> dict[str, list[Split]]:
    """Random folds of all pairs, `repeats` times; and each category against the others."""
    n, generator = len(categories), torch.Generator().manual_seed(0)
    orders = [torch.randperm(n, generator=generator).tolist() for _ in range(repeats)]
    tests = {
        "pairs": [sorted(order[fold::folds]) for order in orders for fold in range(folds)],
        "categories": [[i for i in range(n) if categories[i] == name] for name in dict.fromkeys(categories)],
    }
    return {kind: [([i for i in range(n) if i not in out], out) for out in outs] for kind, outs in tests.items()}


def transfer(directions: gr.Directions, categories: Sequence[str]) -> dict[str, dict[str, float]]:
    """AUROC of the mean difference of one category's pairs on every category's; on its own, in sample."""
    places = {name: [i for i, c in enumerate(categories) if c == name] for name in dict.fromkeys(categories)}
    fit = fitted(directions, gr.directions.estimators.MeanDifference())
    return {
        source: {target: round(float(beats(fit, [(kept, rows)], len(categories)).nanmean()), 4)
                 for target, rows in places.items()}
        for source, kept in places.items()
    }  # fmt: skip
