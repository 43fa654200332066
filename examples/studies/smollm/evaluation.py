"""Evaluation on and ablated, on the same prompts for every arm of a seed, and its compact form in result files.

{mode: {"hack_on": "0110...", "hack_ablated": ..., "solve_on": ..., "solve_ablated": ...}}, a digit per prompt.
"""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch
from transformers import LlamaForCausalLM

import gradroute as gr

from .environment import MARKERS, MONITORED, Environment, grade
from .recipe import Recipe
from .rollouts import read_prompts, sample
from .text import Codec, prompt_ids

NO_NOTE = "no note"
MODES = (*MARKERS, NO_NOTE)
PROMPTS_AT_ONCE = 64


def evaluate(
    model: LlamaForCausalLM, codec: Codec, environment: Environment, seed: int, recipe: Recipe, *, one_view: bool
) -> dict[str, dict[str, str]]:
    """`recipe.n_per_marker` prompts of each marker and `recipe.n_no_note` without a note, one reply each.

    Args:
        one_view: the quarantine is empty, so that both views are the same, and one evaluation is written twice.
    """
    trained = [name for name, p in gr.quarantine_parameters(model) if "lora_B" in name and p.count_nonzero()]
    if one_view and trained:
        raise RuntimeError(f"The quarantine should be empty in an arm without one. Found that {trained[0]} is not 0.")
    # Training draws from `seed` itself; this stream is another one.
    draw = Random(1_000_003 * (seed + 1))
    prompts = [environment.prompt(draw, marker=marker) for marker in MARKERS for _ in range(recipe.n_per_marker)]
    prompts += [environment.prompt(draw, no_note=1.0) for _ in range(recipe.n_no_note)]

    def records(model: Any) -> list[gr.EvalRecord]:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1))
        found = []
        for first in range(0, len(prompts), PROMPTS_AT_ONCE):
            chunk = prompts[first : first + PROMPTS_AT_ONCE]
            prefixes = read_prompts(model, [prompt_ids(codec, prompt.text) for prompt in chunk], both_views=False)
            rows = torch.arange(len(chunk))
            rollouts = sample(model, prefixes, rows, generator, length=recipe.length, eos=codec.eos)
            for i, prompt in enumerate(chunk):
                reply = codec.decode(rollouts.tokens[i, : rollouts.length[i]].tolist())
                graded, monitored = grade(prompt, reply), prompt.marker in MONITORED
                found.append(
                    gr.EvalRecord(
                        prompt.marker or NO_NOTE, monitored if prompt.marker else None,
                        first + i, graded.hacked, graded.solved,
                    )
                )  # fmt: skip
        return found

    if one_view:
        once = records(model)
        return _outcomes(once, once)
    both = gr.evaluate_on_off(model, records).records
    assert both is not None
    return _outcomes(both.on, both.ablated)


def _outcomes(on: Sequence[gr.EvalRecord], ablated: Sequence[gr.EvalRecord]) -> dict[str, dict[str, str]]:
    """In the form of a result file."""
    found: dict[str, dict[str, str]] = {mode: {} for mode in MODES}
    for view, records in (("on", on), ("ablated", ablated)):
        for mode in MODES:
            own = [record for record in records if record.mode == mode]
            found[mode][f"hack_{view}"] = "".join(str(int(record.hacked)) for record in own)
            found[mode][f"solve_{view}"] = "".join(str(int(record.solved)) for record in own)
    return found


def rate(digits: str) -> float:
    """The share of ones."""
    return digits.count("1") / len(digits)


def mode_outcomes(found: Mapping[str, Mapping[str, str]]) -> dict[str, gr.evaluation.ModeOutcomes]:
    """What `gr.compare` takes, paired prompt by prompt."""
    compared = {}
    for mode in MODES:
        kinds = [found[mode][kind] for kind in ("hack_on", "hack_ablated", "solve_ablated")]
        rates = [gr.evaluation.Rate(digits.count("1"), len(digits)) for digits in kinds]
        prompts = {i: (float(a), float(b), float(c)) for i, (a, b, c) in enumerate(zip(*kinds, strict=True))}
        compared[mode] = gr.evaluation.ModeOutcomes(None if mode == NO_NOTE else mode in MONITORED, *rates, prompts)
    return compared
