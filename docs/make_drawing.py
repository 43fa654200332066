"""Draws `pictures/routed_layer.svg`: how data and gradients flow through a routed layer.

python docs/make_drawing.py
"""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

FOLDER = Path(__file__).parent / "pictures"
FORWARD = {"arrowstyle": "-|>", "color": "0.15", "lw": 1.4}
BACKWARD = {"arrowstyle": "-|>", "color": "0.45", "lw": 1.2, "linestyle": (0, (3, 2))}


def box(ax: Any, x: float, y: float, text: str, *, width: float = 1.0, face: str = "1", style: str = "-") -> None:
    """A labelled box around (x, y)."""
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.28), width, 0.56, boxstyle="round,pad=0.03", fc=face, ec="0.15", lw=1.2, ls=style
        )
    )
    ax.text(x, y, text, ha="center", va="center", fontsize=10)


def arrow(ax: Any, start: tuple[float, float], end: tuple[float, float], style: dict[str, Any]) -> None:
    """An arrow from one point to another."""
    ax.annotate("", xy=end, xytext=start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})


def drawing() -> Figure:
    """The whole picture."""
    figure = Figure(figsize=(8.6, 4.1), layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(-0.55, 9.4), ylim=(-1.15, 3.6))
    ax.axis("off")
    rows = {"base": 3.0, "deployed": 1.75, "quarantine": 0.5}
    ax.text(-0.3, rows["deployed"], "x", fontsize=13, ha="center", va="center")
    for y in rows.values():
        ax.plot([-0.12, 0.35, 0.35], [rows["deployed"], rows["deployed"], y], color="0.15", lw=1.4)
    box(ax, 3.45, rows["base"], "W   frozen", width=1.7, face="0.88")
    arrow(ax, (0.35, rows["base"]), (2.57, rows["base"]), FORWARD)
    arrow(ax, (4.33, rows["base"]), (7.58, rows["base"]), FORWARD)
    for name, letter, shade in (("deployed", "d", "1"), ("quarantine", "q", "0.94")):
        y = rows[name]
        box(ax, 1.9, y, f"$A_{letter}$", face=shade)
        box(ax, 5.0, y, f"$s_{letter} B_{letter}$", face=shade)
        arrow(ax, (0.35, y), (1.36, y), FORWARD)
        arrow(ax, (5.53, y), (7.58, y), FORWARD)
        ax.text(1.9, y - 0.52, f"gradient $\\times\\ g_{letter}$", ha="center", fontsize=8.5, color="0.3")
        ax.text(5.0, y - 0.52, f"gradient $\\times\\ g_{letter}$", ha="center", fontsize=8.5, color="0.3")
    arrow(ax, (2.43, rows["deployed"]), (4.47, rows["deployed"]), FORWARD)
    box(ax, 3.45, rows["quarantine"], "$\\times$ m · scale", width=1.1, style=":")
    arrow(ax, (2.43, rows["quarantine"]), (2.87, rows["quarantine"]), FORWARD)
    arrow(ax, (4.03, rows["quarantine"]), (4.47, rows["quarantine"]), FORWARD)
    ax.text(3.45, rows["quarantine"] - 0.52, "scale 0: ablated", ha="center", fontsize=8.5, color="0.3")
    ax.text(6.55, rows["deployed"] + 0.16, "deployed block", ha="center", fontsize=9)
    ax.text(6.55, rows["quarantine"] + 0.16, "quarantine block", ha="center", fontsize=9)
    ax.plot([7.6, 7.6], [rows["quarantine"], rows["base"]], color="0.15", lw=1.4)
    ax.add_patch(matplotlib.patches.Circle((7.6, rows["deployed"]), 0.2, fc="1", ec="0.15", lw=1.2, zorder=3))
    ax.text(7.6, rows["deployed"], "+", ha="center", va="center", fontsize=13, zorder=4)
    arrow(ax, (7.8, rows["deployed"]), (8.7, rows["deployed"]), FORWARD)
    ax.text(8.95, rows["deployed"], "y", fontsize=13, ha="center", va="center")
    arrow(ax, (8.7, -0.62), (0.2, -0.62), BACKWARD)
    ax.text(
        4.45, -0.95, "dL/dx, to lower layers: the true derivative, through all three paths, not gated",
        ha="center", fontsize=9, color="0.3",
    )  # fmt: skip
    return figure


def main() -> None:
    """Write the SVG, the same bytes each time."""
    matplotlib.rcParams["svg.hashsalt"] = "routed_layer"
    FOLDER.mkdir(exist_ok=True)
    drawing().savefig(FOLDER / "routed_layer.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
