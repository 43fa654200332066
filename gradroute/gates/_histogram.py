"""The picture of `Gate.plot`: where scores lie, and what the gate does with them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gradroute._plot import legend_aside, new_axes


class Marked(NamedTuple):
    """Scores on the axis on which a gate decides.

    Args:
        values: of the rollouts.
        axis: its label.
        thresholds: (place, label) of every line.
        routed: which rollouts the gate would route, where that is a yes or no.
    """

    values: Float[Tensor, " rows"]
    axis: str
    thresholds: Sequence[tuple[float, str]]
    routed: Bool[Tensor, " rows"] | None


def plot_marked(marked: Marked, labels: Bool[Tensor, " rows"] | None, ax: Any) -> tuple[Any, Any]:
    """(figure, axes) with a histogram of the values; of hacks and others apart where labels are given."""
    fig, ax = new_axes(ax, (7.0, 3.2))
    values = marked.values.detach().double().cpu()
    low, high = values.min().item(), values.max().item()
    pad = 0.02 * (high - low or 1.0)
    bins = torch.linspace(low - pad, high + pad, 33).tolist()
    if labels is None:
        ax.hist(values.tolist(), bins, histtype="stepfilled", color="0.75", edgecolor="0.2", label=f"n = {len(values)}")
    else:
        clean, hack = values[~labels.cpu()], values[labels.cpu()]
        name = f"not a hack, n = {len(clean)}"
        ax.hist(clean.tolist(), bins, histtype="stepfilled", color="0.85", edgecolor="0.45", label=name)
        ax.hist(hack.tolist(), bins, histtype="step", color="0", hatch="////", lw=1.2, label=f"hack, n = {len(hack)}")
    for (place, label), style in zip(marked.thresholds, ("-", "--", ":"), strict=False):
        ax.axvline(place, color="0", linestyle=style, lw=1.2, label=f"{label}, {place:.3g}")
    if marked.routed is not None:
        ax.set_title(_shares(marked.routed.cpu(), None if labels is None else labels.cpu()), fontsize=9)
    ax.set(xlabel=marked.axis, ylabel="rollouts")
    legend_aside(ax)
    return fig, ax


def _shares(routed: Bool[Tensor, " rows"], labels: Bool[Tensor, " rows"] | None) -> str:
    if labels is None:
        return f"routed: {int(routed.sum())} of {len(routed)}"
    hacks, others = routed[labels], routed[~labels]
    return f"routed: {int(hacks.sum())} of {len(hacks)} hacks, {int(others.sum())} of {len(others)} others"
