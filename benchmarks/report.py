"""The figures as Markdown; the tables of docs/performance.md are made from docs/results/performance.json."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.findings import findings

DOCS = Path(__file__).parents[1] / "docs"
RESULTS, PAGE = DOCS / "results" / "performance.json", DOCS / "performance.md"
BLOCK = re.compile(r"(<!-- table: performance (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Figures = dict[str, Any]


def table(found: Figures) -> str:
    """Every row: goals first."""
    return goals(found) + "\n\n" + others(found)


def pasted(found: Figures, command: list[str], versions: dict[str, str]) -> str:
    """What was run, on what and with which versions, and all that was measured."""
    of, shape = found["machine"], found["shape"]
    parts = [
        f"**gradroute's benchmarks on {of['device']}**",
        f"`{' '.join(command)}`; " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".",
        f"A Llama of width {shape['hidden']}, {shape['layers']} layers, {shape['batch']} x {shape['seq']} tokens, r = "
        f"{shape['r']} + {shape['r']}; base in {of['dtype']}, blocks in float32, as PEFT makes them. "
        f"{sum(found['wall_s'].values()):.0f} s in all.",
        *(f"**{name} failed.** {error}" for name, error in found.get("failed", {}).items()),
    ]
    of_rows = [goals, others] if found["rows"] else []
    made = [*of_rows, *(make for key, make in (("counts", counts), ("grid", grid)) if key in found)]
    return "\n\n".join([*parts, *(make(found) for make in made)])


def goals(found: Figures) -> str:
    """The rows that have a goal."""
    rows = [row for row in found["rows"] if row["goal"]]
    return _markdown(["", "what", "threads", "measured", "quartiles", "goal", "met"], [
        [row["goal"], row["what"], str(row["threads"]), _value(row), _quartiles(row),
         "flat" if row["limit"] is None else f"<= {row['limit']:g}",
         {True: "yes", False: "**no**", None: ""}[row["met"]]]
        for row in rows
    ])  # fmt: skip


def others(found: Figures) -> str:
    """The rows that have no goal."""
    rows = [row for row in found["rows"] if not row["goal"]]
    return _markdown(["what", "threads", "measured", "quartiles"], [
        [row["what"], str(row["threads"]), _value(row), _quartiles(row)] for row in rows
    ])  # fmt: skip


def counts(found: Figures) -> str:
    """Counted operations and bytes beside their floors, and both as ratios to LoRA's."""
    of, lora = found.get("counts", {}), found.get("counts", {}).get("LoRA", {})
    lines = []
    for name, figures in of.items():
        cells = [name]
        for key, unit in (("flops", 1e9), ("bytes", 1e6), ("saved", 1e6), ("products", 1)):
            if key not in figures:
                cells.append("")
            else:
                cells.append(f"{figures[key] / unit:,.{0 if unit == 1 else 1}f} ({figures[key] / lora[key]:.3f})")
        lines.append(cells)
    titles = ["step", "GFLOP", "MB read and written", "MB kept for backward", "matrix products"]
    return _markdown([titles[0], *(f"{title} (/ LoRA)" for title in titles[1:])], lines)


def grid(found: Figures) -> str:
    """Steps over width x depth x batch, with the fitted exponents below."""
    measured = found.get("grid", {"points": [], "exponents": {}})
    lines = [
        [str(p["width"]), str(p["depth"]), str(p["batch"]), f"{p['routed_ms']:.1f}", f"{p['LoRA_ms']:.1f}",
         f"{p['ratio']:.3f}"]
        for p in measured["points"]
    ]  # fmt: skip
    for arm, fitted in measured["exponents"].items():
        lines.append(
            [f"**{fitted[axis]:.2f}**" for axis in ("width", "depth", "batch")] + [f"exponents, {arm}", "", ""]
        )
    return _markdown(["width", "depth", "batch", "routed, ms", "LoRA, ms", "ratio"], lines)


def plan(found: Figures) -> str:
    """The large models on paper."""
    plans = found.get("plan", {})
    names = list(next(iter(plans.values()), {}))
    return _markdown(["GB, on each of 8 ranks", *plans], [
        [name, *(f"{figures[name]:.3g}" for figures in plans.values())] for name in names
    ])  # fmt: skip


def setting(found: Figures) -> str:
    """The machine and the command."""
    of = found["machine"]
    lines = [f"{of['device']}; {of['dtype']}, torch {of['torch']}; {sum(found['wall_s'].values()):.0f} s in all."]
    return "\n".join(lines)


TABLES: dict[str, Callable[[Figures], str]] = {
    "findings": findings, "setting": setting, "goals": goals, "others": others, "counts": counts, "grid": grid,
    "plan": plan,
}  # fmt: skip


def updated(text: str, found: Figures) -> str:
    """`text` with every block written again."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{TABLES[match[2]](found)}\n\n{match[3]}", text)


def write_docs(found: Figures) -> None:
    """The JSON, and the page's tables from it."""
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


def _value(row: Figures) -> str:
    return {"seconds": "{:.0f} s", "share": "{:.1%}"}.get(row["unit"], "{:.3f}").format(row["value"])


def _quartiles(row: Figures) -> str:
    return "" if row["q1"] is None else f"{row['q1']:.3f} to {row['q3']:.3f}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
