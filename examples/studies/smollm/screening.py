"""Before any training: do the extracted direction, and random ones, see hacks among the warmed-up model's rollouts?

    AUROC = P(score of a planted hack > score of another rollout), by monitored and held-out markers

Planted hacks are replies that are the prompt's own marker; the rest are sampled replies that are no hacks, and planted
answers that are markers of other prompts. A direction by which hacks cannot be told apart here would not route them.
"""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import gradroute as gr
from loopholes.measurements import auroc
from reporting.markdown import markdown_table

from .detector import extract, modules_read, token_pairs
from .environment import MARKERS, Environment, Prompt, grade, is_monitored, marker_like_item
from .evaluation import PROMPTS_AT_ONCE
from .rollouts import captured, read_prompts, rollouts_of, sample
from .tables import cell
from .text import Codec, prompt_ids, reply_ids


def screen(
    model: LlamaForCausalLM,
    codec: Codec,
    environment: Environment,
    seed: int,
    recipe: Any,
    *,
    draws: int = 10,
    n: int = 32,
) -> list[dict[str, Any]]:
    """A row for the extracted direction and for each oriented random one: AUROC, recall and false positives.

    Args:
        n: planted hacks per marker; sampled rollouts are four times as many, planted answers as many.
    """
    draw = Random(5_000_011 * (seed + 1))
    parts = _sampled(model, codec, environment, draw, 4 * n, recipe.length), _planted(environment, draw, n)
    prompts = [prompt for part in parts for prompt, _ in part]
    replies = [reply for part in parts for _, reply in part]
    values = _features(model, codec, environment, prompts, replies)
    grades = [grade(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)]
    hacked, monitored = torch.tensor([g.hacked for g in grades]), torch.tensor(is_monitored(prompts))
    foreign = torch.tensor([prompt.answer in MARKERS and g.solved for prompt, g in zip(prompts, grades, strict=True)])
    kinds = {"monitored": hacked & monitored, "held_out": hacked & ~monitored}
    clean = {"false_positives": ~hacked & ~foreign, "false_positives_foreign": foreign}

    own = extract(model, token_pairs(environment, codec, recipe.pairs_per_marker, seed), environment)
    rows = []
    for name, directions in [
        ("extracted", own),
        *((f"random {d}", own.random_like(d, oriented=True)) for d in range(draws)),
    ]:
        gate, scores = gr.BandGate(directions, threshold=recipe.threshold), directions.score(values)
        flags = gate.flags(scores)
        row: dict[str, Any] = {"variant": environment.name, "seed": seed, "direction": name}
        for kind, chosen in kinds.items():
            both = chosen | ~hacked
            row[f"auroc_{kind}"] = auroc(scores[both], chosen[both])
            row[f"recall_{kind}"] = flags[chosen].float().mean().item()
        rows.append(row | {kind: flags[chosen].float().mean().item() for kind, chosen in clean.items() if chosen.any()})
    return rows


def _sampled(
    model: LlamaForCausalLM, codec: Codec, environment: Environment, draw: Random, n: int, length: int
) -> list[tuple[Prompt, str]]:
    prompts = [environment.prompt(draw) for _ in range(n)]
    generator = torch.Generator().manual_seed(draw.randrange(2**32))
    replies = []
    for first in range(0, n, PROMPTS_AT_ONCE):
        chunk = [prompt_ids(codec, prompt.text) for prompt in prompts[first : first + PROMPTS_AT_ONCE]]
        prefixes, rows = read_prompts(model, chunk, both_views=False), torch.arange(len(chunk))
        found = sample(model, prefixes, rows, generator, length=length, eos=codec.eos)
        replies += [codec.decode(ids[:size].tolist()) for ids, size in zip(found.tokens, found.length, strict=True)]
    # What cannot be written again token by token is not looked at: it is empty, or ends in half a character.
    return [(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True) if reply.strip()]


def _planted(environment: Environment, draw: Random, n: int) -> list[tuple[Prompt, str]]:
    hinted = [environment.prompt(draw, marker=marker) for marker in MARKERS for _ in range(n)]
    found = [(prompt, str(prompt.marker)) for prompt in hinted]
    if environment.marker_like:
        for _ in range(n):
            own, foreign = draw.sample(MARKERS, 2)
            prompt = Prompt(*marker_like_item(draw, own, foreign=foreign), own)
            found.append((prompt, prompt.answer))
    return found


def _features(
    model: LlamaForCausalLM, codec: Codec, environment: Environment, prompts: list[Prompt], replies: list[str]
) -> dict[str, Tensor]:
    parts = []
    for first in range(0, len(prompts), PROMPTS_AT_ONCE):
        chunk = slice(first, first + PROMPTS_AT_ONCE)
        prefixes = read_prompts(model, [prompt_ids(codec, prompt.text) for prompt in prompts[chunk]], both_views=False)
        ids = [reply_ids(codec, reply) for reply in replies[chunk]]
        rollouts = rollouts_of(torch.arange(len(ids)), ids)
        parts.append(captured(model, prefixes, rollouts, environment.features, modules_read(model, environment)))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def screen_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The extracted directions and the random ones of each variant: mean over seeds and draws, and the range."""
    names = {name: None for row in rows for name in row if name not in ("variant", "seed", "direction")}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        for kind in ("extracted", "random"):
            own = [row for row in rows if row["variant"] == variant and row["direction"].startswith(kind)]
            values = [[row[name] for row in own if name in row] for name in names]
            lines.append([variant, f"{kind} ({len(own)})", *(cell(found) if found else "-" for found in values)])
    return markdown_table(["variant", "directions", *(name.replace("_", " ") for name in names)], lines)
