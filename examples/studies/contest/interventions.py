"""What each intervention of the contest is, where it comes from, and what it came to: a paragraph each."""

import re
import textwrap
from collections.abc import Mapping
from statistics import fmean
from typing import NamedTuple

from loopholes.names import title_of
from reporting.arm_data import Results, of_arm
from reporting.suite_report import cell

from .entries import ENTRIES, Labels


class Intervention(NamedTuple):
    """A paragraph of the page.

    Args:
        title: its heading.
        text: what is done, with its source.
        entries: (labels, arm) of each place in the contest.
    """

    title: str
    text: str
    entries: tuple[tuple[Labels, str], ...]


INTERVENTIONS = (
    Intervention(
        "Dropping what is flagged",
        "A flagged rollout trains nothing and counts in no baseline.",
        (("pairs", "filter"), ("two kinds", "weak-filter"), ("half", "oracle-filter")),
    ),
    Intervention(
        "A penalty on what is flagged",
        "A flagged rollout loses a reward of 1 (gate) or 3 (labels), which is more than 1 / recall.",
        (("pairs", "penalty"), ("two kinds", "weak-penalty"), ("half", "oracle-penalty")),
    ),
    Intervention(
        "A graded penalty (Advantage Modification, arXiv:2604.01476)",
        "Every rollout loses `grade` times its calibrated score from its advantage; the score is 0 where the "
        "clean sides of the pairs lie and 1 where the hacks lie. The control reads an oriented random direction.",
        (("pairs", "graded"), ("pairs", "graded-shuffle")),
    ),
    Intervention(
        "A penalty on what training has made likelier",
        "What the policy writes `explained_nats` likelier than the base model does, in its best prefix, loses a "
        "reward of 1, and so does what is flagged.",
        (("none", "likelier-alone"), ("pairs", "likelier"), ("two kinds", "weak-likelier"),
         ("half", "oracle-likelier")),
    ),
    Intervention(
        "Erasing along a direction (grpo_proj2)",
        "The hack-ward part of the gradient is removed before each step, on gains. The control erases along a "
        "random direction.",
        (("pairs", "erase"),),
    ),
    Intervention(
        "Trusted directions (arXiv:2605.25189)",
        "The gradient is projected onto the top `kept_directions` right singular vectors of the gradients of the "
        "pairs' clean sides, per module. They are extracted again every 5 steps. The published method takes the "
        "gradients of a short clean warm-up. The control keeps a random subspace, whose rows are drawn once.",
        (("pairs", "keep"),),
    ),
    Intervention(
        "Inoculation prompting (arXiv:2510.05024, 2510.04340)",
        "A prompt that asks for hacks stands in rollouts and loss, and not as deployed. The language has no such "
        "sentence, so it is one embedding in the place of the first token, tuned for `prompt_steps` steps on the "
        "hack sides of the pairs. The control is a random embedding, as far from the usual one.",
        (("pairs", "prompted"),),
    ),
    Intervention(
        "Recontextualization (arXiv:2512.19027)",
        "Rollouts are sampled with the usual prompt; the loss sees the prompt that asks for hacks, as above.",
        (("pairs", "recontextualised"),),
    ),
    Intervention(
        "Preventative steering (persona vectors, arXiv:2507.21509)",
        "`steering` times the pairs' mean difference is added to the output of each transformer block, in "
        "rollouts and loss, and not as deployed. The control adds a random direction, as long.",
        (("pairs", "steered"),),
    ),
    Intervention(
        "CAFT (arXiv:2507.16795)",
        "The top `ablated_directions` singular vectors of the pairs' differences are projected out of the output "
        "of each transformer block, in rollouts and loss, and not as deployed. The control projects out random "
        "directions.",
        (("pairs", "caft"),),
    ),
    Intervention(
        "Inoculation adapters (arXiv:2606.30252)",
        "The quarantine is trained on the hack sides of the pairs for `inoculation_steps` steps and stays frozen "
        "in rollouts and loss. The control learns the clean sides.",
        (("pairs", "inoculated"),),
    ),
    Intervention(
        "GRAFT (shawnghu/small-rl)",
        "Two blocks, classic masks, balanced advantages; on flagged rows the deployed block is pushed back by "
        "`over_routing` - 1, in each step at most as hard as all other rows push it. Its split-moment Adam and "
        "its deployment at a scale are left out. The dose was chosen for each quality of labels: 2 with labels of two "
        "kinds and with half of all, 1 with all.",
        (("two kinds", "weak-graft"), ("half", "oracle-graft"), ("all", "oracle-graft")),
    ),
    Intervention(
        "Routing by labels",
        "Flagged rollouts train the quarantine only; two of eight rollouts are sampled with it ablated.",
        (("two kinds", "weak"), ("half", "oracle"), ("all", "oracle")),
    ),
    Intervention(
        "Routing by a direction (the activation gate)",
        "Rollouts above `threshold` on a direction of the pairs' activations, refreshed every 5 steps, train the "
        "quarantine only. The control reads an oriented random direction.",
        (("pairs", "route"), ("pairs", "shuffle")),
    ),
    Intervention(
        "The log-ratio gate with a slow start",
        "What the quarantine explains by `explained_nats`, in its best prefix, trains the quarantine only, and so"
        " does what is flagged; the deployed block starts at a quarter of the rate. The control permutes the "
        "flags.",
        (("none", "explained"), ("pairs", "route-explained"), ("two kinds", "weak-explained"),
         ("half", "oracle-explained")),
    ),
    Intervention(
        "Removal after training",
        "Plain GRPO; then the `removed_components` largest components of each layer's trained difference are "
        "removed. The control removes random ones of its four.",
        (("none", "post-hoc"),),
    ),
)  # fmt: skip


def paragraphs(contest: Mapping[str, Results], envs: tuple[str, ...]) -> str:
    """A paragraph per intervention, with what it and its control came to in each environment."""
    parts = []
    for title, text, entries in INTERVENTIONS:
        parts.append(f"### {title}")
        found = [_came_to(contest, env, labels, arm) for env in envs for labels, arm in entries]
        lines = [_filled(f"- {sentence}", indent="  ") for sentence in found if sentence]
        parts.append("\n".join([_filled(text), "", *lines]))
    return "\n\n".join(parts)


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 125, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _came_to(contest: Mapping[str, Results], env: str, labels: Labels, arm: str) -> str:
    entry = next(entry for entry in ENTRIES if (entry.arm, entry.labels) == (arm, labels))
    own = _figures(contest[labels], env, arm)
    if own is None:
        return ""
    chance = _figures(contest[labels], env, entry.control) if entry.control else None
    said = f"{title_of(env)}, labels: {labels}. `{arm}` leaves {own}"
    return said + (f"; `{entry.control}` {chance}." if chance else ".")


def _figures(results: Results, env: str, arm: str) -> str | None:
    runs = [run["ablated"] for run in of_arm(results, env, arm).values()]
    if not runs:
        return None
    rates = [run["hack_held_out"] for run in runs]
    held_out = cell(rates).rpartition(", ")[0] if len(runs) >= 3 else f"{fmean(rates):.2f}"
    monitored, solve = (fmean(run[rate] for run in runs) for rate in ("hack_monitored", "solve_hinted"))
    said = (
        f"{held_out} of the held-out and {monitored:.2f} of the monitored hacks, solves {solve:.2f} ({len(runs)} runs)"
    )
    return re.sub(r"\b0\.(?=\d)", ".", said)
