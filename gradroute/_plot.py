"""Axes to draw on. matplotlib is an extra (`gradroute[plot]`) and is imported when the first picture is drawn."""

from importlib import import_module
from typing import Any

from gradroute.errors import GradRouteError


def new_axes(ax: Any, size: tuple[float, float]) -> tuple[Any, Any]:
    """(figure, axes): those of `ax`, or new ones of `size` in inches.

    Raises:
        GradRouteError: matplotlib is not installed.
    """
    if ax is not None:
        return ax.figure, ax
    try:
        pyplot = import_module("matplotlib.pyplot")
    except ModuleNotFoundError as error:
        raise GradRouteError("Plots need matplotlib. Found none. Fix: pip install 'gradroute[plot]'.") from error
    fig, ax = pyplot.subplots(figsize=size, layout="constrained")
    return fig, ax


def legend_aside(ax: Any) -> None:
    """A legend to the right of the axes, where it covers nothing."""
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
