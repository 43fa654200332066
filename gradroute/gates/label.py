"""From flags to a mask: flagged -> route, else `below`."""

from typing import ClassVar

import torch
from jaxtyping import Bool
from torch import Tensor

from gradroute._checks import described, one_of, share
from gradroute._logging import warn
from gradroute._state_dict import State
from gradroute.adapters.mask import RouteMask
from gradroute.errors import GradRouteError
from gradroute.gates.base import BELOW, Below, Gate, Reads, below_mask, below_sentence


class LabelGate(Gate):
    """flagged -> route, else `below`; for labels from a monitor or an oracle.

    With `recall` or `false_positive_rate` the flags are taken as the truth, and the gate simulates a worse monitor:

        P(routed | flagged) = recall,     P(routed | not flagged) = false_positive_rate,     independently per row

    Args:
        below: zone of the rows that are not routed: "absorb" trains both blocks, "keep" the deployed block only.
        recall, false_positive_rate: of the simulated monitor, in [0, 1].
        seed: of the simulation; the global generator is not used.
        window, strict: a gate that routed nothing, or everything, in `window` calls warns, or raises if strict; so does
            a simulated monitor with more false alarms than hits.

    Warns at once about a false-positive rate of 10 % or more: published runs collapsed the deployed side at 10 %,
    while a recall of 20 % still routed (GRAFT, in shawnghu/small-rl).
    """

    reads: ClassVar[Reads] = "flags"

    def __init__(
        self,
        *,
        below: Below = "absorb",
        recall: float = 1.0,
        false_positive_rate: float = 0.0,
        seed: int = 0,
        window: int = 50,
        strict: bool = False,
    ) -> None:
        self.below = one_of("below", below, BELOW)
        self.recall = share("recall", recall)
        self.false_positive_rate = share("false_positive_rate", false_positive_rate)
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        super().__init__(window=window, strict=strict)
        if self.false_positive_rate >= 0.1:
            warn(
                f"`false_positive_rate` is {self.false_positive_rate:g}: routing a tenth of the clean rollouts has "
                "collapsed the deployed block in published runs. Recall matters less: prefer a stricter monitor."
            )

    def __call__(self, flags: Bool[Tensor, "*rows"]) -> RouteMask:
        self._before_call()
        if not isinstance(flags, Tensor) or flags.dtype != torch.bool:
            raise GradRouteError(f"`flags` should be a boolean tensor, True for hacks. Found {described(flags)}.")
        routed = flags
        if self._simulates:
            chance = torch.rand(flags.shape, generator=self._generator, dtype=torch.float64)
            routed = (chance < torch.where(flags.cpu(), self.recall, self.false_positive_rate)).to(flags.device)
        mask = below_mask(routed, self.below)
        self._hits += int((routed & flags).sum())
        self._false_alarms += int((routed & ~flags).sum())
        return self._counted(mask, routed)

    def describe(self) -> str:
        return below_sentence(self.below)

    def settings(self) -> State:
        return {
            "below": self.below,
            "recall": self.recall,
            "false_positive_rate": self.false_positive_rate,
            "seed": self.seed,
        }

    def state_dict(self) -> State:
        simulation = {
            "generator": self._generator.get_state(),
            "hits": self._hits,
            "false_alarms": self._false_alarms,
        }
        return {**super().state_dict(), "simulation": simulation}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        simulation = state["simulation"]
        self._generator.set_state(simulation["generator"])
        self._hits, self._false_alarms = simulation["hits"], simulation["false_alarms"]

    def __repr__(self) -> str:
        simulated = f", recall={self.recall:g}, false_positive_rate={self.false_positive_rate:g}, seed={self.seed}"
        return f"LabelGate(below={self.below!r}{simulated if self._simulates else ''})"

    @property
    def _simulates(self) -> bool:
        return (self.recall, self.false_positive_rate) != (1.0, 0.0)

    def _open_window(self) -> None:
        super()._open_window()
        self._hits, self._false_alarms = 0, 0

    def _complaints(self) -> list[str]:
        complaints = super()._complaints()
        if self._false_alarms > self._hits:
            precision = self._hits / (self._hits + self._false_alarms)
            complaints.append(
                f"{self!r} routed more clean rows than hacks in {self.window} calls: its precision was "
                f"{precision:.2f}. The deployed block loses what those rows would have taught it. "
                "Fix: fewer false positives."
            )
        return complaints
