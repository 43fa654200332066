"""The sentences that docs/performance.md begins with: what each part of routing costs, and which goals are missed."""

import textwrap
from typing import Any

STEP = "routed step / LoRA of rank r + r_quarantine"


def findings(found: dict[str, Any]) -> str:
    """Bullets from the measured rows."""
    rows = found["rows"]

    def value(what: str) -> str:
        row = next(row for row in rows if row["what"] == what)
        return f"{row['value']:.0%}" if row["unit"] == "share" else f"{row['value']:.2f}"

    by_threads = [f"{row['value']:.2f} on {_threads(row)}" for row in rows if row["what"] == STEP]
    filters = [row["value"] for row in rows if row["what"].startswith("step with RolloutFilter")]
    judged = [row for row in rows if row["met"] is not None]
    missed = [f"{row['goal']} ({row['what']}, {_threads(row)})" for row in judged if not row["met"]]
    text = f"""
        A routed training step takes {" and ".join(by_threads)} of the time of a step with LoRA of rank r +
        r_quarantine. Its peak memory is {value("peak memory of a routed step / LoRA")} of LoRA's.

        An ablated forward takes {value("ablated forward / LoRA of rank r")} of the time of LoRA of rank r. Decoding
        token by token with both blocks takes {value("one-token decode, on / LoRA of rank 2r")} of LoRA of rank 2r. A
        merged forward takes {value("merged forward / bare model")} of the bare model's.

        Extracting directions from activations takes {value("activation extraction / bare forward")} of bare forwards.
        With 4 pairs every 5 steps, it adds {value("extraction of 4 pairs every 5 steps, share of a step")} to a step.

        A `RolloutFilter` adds {max(filters) - 1:.0%} to a step.

        Goals missed: {len(missed)} of {len(judged)}{": " if missed else ""}{"; ".join(missed)}.
    """
    return "\n".join(
        textwrap.fill(" ".join(each.split()), 125, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for each in text.strip().split("\n\n")
    )


def _threads(row: dict[str, Any]) -> str:
    return {1: "one thread", 2: "two threads"}.get(row["threads"], f"{row['threads']} threads")
