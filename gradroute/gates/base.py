"""The base of every gate: a check that it still tells rows apart, words and a picture of it, and a state dict.

Over each window of calls:   no row was routed, or every row was   ->   `GradRouteWarning`, an error if strict.

A gate that never routes is a gate that is off; one that always routes starves the deployed block. Both look like a run
that works.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from gradroute._before_use import before_use
from gradroute._checks import described, positive_integer
from gradroute._logging import warn
from gradroute._plot import legend_aside, new_axes
from gradroute._sharding import wide
from gradroute._state_dict import State, check_state, format_of
from gradroute.adapters.mask import RouteMask
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError

Below = Literal["absorb", "keep"]
BELOW: tuple[Below, ...] = ("absorb", "keep")
Reads = Literal["flags", "scores", "features", "log_ratios"]


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


class Gate(ABC):
    """From scores, labels or features to a `RouteMask`.

    Args:
        window: number of calls; a gate that routed nothing, or everything, in all of them warns.
        strict: raise instead of warning.
    """

    reads: ClassVar[Reads]
    """The argument of the gate: flags, scores of directions, pooled features, or log-probability ratios."""
    directions: Directions | None = None
    """The directions that are read again after each refresh; None for a gate that reads none."""

    def __init__(self, *, window: int, strict: bool) -> None:
        self.window, self.strict = positive_integer("window", window), bool(strict)
        self._open_window()

    @abstractmethod
    def settings(self) -> State:
        """The arguments that the gate was built with, as JSON values."""

    @abstractmethod
    def describe(self) -> str:
        """Say which rows train which block, in a sentence for a model card."""

    def plot(
        self, scores: Float[Tensor, " rows"], labels: Bool[Tensor, " rows"] | None = None, ax: Any = None
    ) -> tuple[Any, Any]:
        """A histogram of scores with the gate's thresholds; returns (figure, axes). Needs matplotlib.

        Args:
            scores: of rollouts, as this gate is called with; a `QuantileGate`: as `directions.score` gives them.
            labels: True for hacks, drawn apart.
            ax: matplotlib axes to draw on; None makes a figure.

        Raises:
            GradRouteError: a gate that reads no scores, scores that are not finite, or labels of another shape.
        """
        if not isinstance(scores, Tensor) or scores.ndim != 1 or not len(scores):
            raise GradRouteError(f"`scores` should be a tensor with one score per rollout. Found {described(scores)}.")
        if labels is not None and (labels.shape != scores.shape or labels.dtype != torch.bool):
            raise GradRouteError(
                f"`labels` should be booleans of shape {tuple(scores.shape)}. Found {described(labels)}."
            )
        return _plotted(self._marked(finite_scores(scores)), labels, ax)

    def _marked(self, scores: Float[Tensor, " rows"]) -> Marked:  # noqa: ARG002  (read by the gates that can)
        raise GradRouteError(f"{type(self).__name__} should read scores to have a histogram. Found that it reads none.")

    def state_dict(self) -> State:
        """Everything that a resumed run needs, as JSON values and tensors."""
        return {
            "format": format_of(self),
            "settings": {**self.settings(), "window": self.window, "strict": self.strict},
            "directions": None if self.directions is None else directions_in_force(self.directions),
            "calls": {"seen": self._calls, "routed": self._routed, "unrouted": self._unrouted},
        }

    def load_state_dict(self, state: State) -> None:
        """Continue from a state that a gate of the same class and settings saved.

        Raises:
            FileFormatError: a state of another class, format or settings, or saved with other directions.
        """
        calls = check_state(self, state, self.state_dict())["calls"]
        self._calls, self._routed, self._unrouted = calls["seen"], calls["routed"], calls["unrouted"]

    def _before_call(self) -> None:
        """Raise where a refresh was due and did not come; the first line of each `__call__`."""
        before_use(self)

    def _counted(self, mask: RouteMask, share: Shaped[Tensor, "*rows"]) -> RouteMask:
        """`mask`, after one more call of the window; `share` is how much of each row is routed, or a flag."""
        self._routed |= bool((share > 0).any())
        self._unrouted |= bool((share < 1).any())
        self._calls += 1
        if self._calls == self.window:
            complaints = self._complaints()
            self._open_window()
            for complaint in complaints:
                if self.strict:
                    raise GradRouteError(complaint)
                warn(complaint)
        return mask

    def _open_window(self) -> None:
        self._calls, self._routed, self._unrouted = 0, False, False

    def _complaints(self) -> list[str]:
        if self._routed and self._unrouted:
            return []
        what, meaning = ("everything", "clean") if self._routed else ("nothing", "hacking")
        return [
            f"{self!r} routed {what} in {self.window} calls. Fix: compare its scores with labels of fifty rollouts; "
            f"where it is right, no rollout was {meaning}."
        ]


def directions_in_force(directions: Directions) -> State:
    """The identity of the directions that a state belongs to."""
    provenance = directions.provenance
    return {
        "version": directions.version,
        "step": directions.step,
        "pair_hash": provenance.pair_hash,
        "estimator": provenance.estimator,
        "control": provenance.control,
        "seed": provenance.seed,
    }


def finite_scores(scores: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """`scores` in float32 or wider, if they are numbers: NaN would be on neither side of a threshold."""
    if not isinstance(scores, Tensor) or not scores.is_floating_point():
        raise GradRouteError(f"`scores` should be a floating point tensor. Found {described(scores)}.")
    if not torch.isfinite(scores).all():
        where = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise GradRouteError(f"`scores` should be finite. Found {scores[tuple(where)].item()} at index {where}.")
    # A threshold on bf16 scores would itself be rounded to three digits.
    return wide(scores)


def below_mask(routed: Bool[Tensor, "*rows"], below: Below) -> RouteMask:
    """Two zones: route, and `below`."""
    return RouteMask.classic(routed) if below == "absorb" else RouteMask.exclusive(routed)


def below_sentence(below: Below) -> str:
    """`below_mask` in words."""
    if below == "absorb":
        return "classic: flagged rows train the quarantine only (route), the others both blocks (absorb)"
    return "exclusive: flagged rows train the quarantine only (route), the others the deployed block only (keep)"


def _plotted(marked: Marked, labels: Bool[Tensor, " rows"] | None, ax: Any) -> tuple[Any, Any]:
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
