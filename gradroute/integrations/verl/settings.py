"""What a run under verl routes by: made once by `register`, read by the engine in each process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from gradroute._checks import one_of, positive_integer
from gradroute.directions.directions import Directions
from gradroute.errors import GradRouteError
from gradroute.gates.band import BandGate
from gradroute.gates.base import Gate

Rollouts = Literal["on", "ablated"]
MakeDirections = Callable[[nn.Module, Any], Directions]
MakeGate = Callable[[Directions], Gate]


@dataclass(frozen=True)
class RoutingSettings:
    """See `register`, whose arguments these are."""

    directions: MakeDirections
    gate: MakeGate = BandGate
    refresh_every: int | None = 5
    r_quarantine: int | None = None
    rollouts: Rollouts = "on"

    def __post_init__(self) -> None:
        for name in ("directions", "gate"):
            if not callable(getattr(self, name)):
                raise GradRouteError(
                    f"`{name}` should be a function. Found {type(getattr(self, name)).__name__}. Fix: pass "
                    "directions=lambda model, tokenizer: extract_activation_directions(...) and "
                    "gate=lambda directions: BandGate(directions), for verl's workers make the model."
                )
        if self.refresh_every is not None:
            positive_integer("refresh_every", self.refresh_every)
        if self.r_quarantine is not None:
            positive_integer("r_quarantine", self.r_quarantine)
        one_of("rollouts", self.rollouts, get_args(Rollouts))

    def made_directions(self, model: nn.Module, tokenizer: Any) -> Directions:
        """What `directions` returns, if it is directions of activations that a log-prob pass can be scored by."""
        directions = self.directions(model, tokenizer)
        if not isinstance(directions, Directions):
            raise GradRouteError(f"`directions` should return Directions. Found {type(directions).__name__}.")
        if directions.provenance.source != "activation":
            raise GradRouteError(
                "`directions` should be of activations: verl's log-prob pass has no gradients to score. Found "
                f"{directions.provenance.source}. Fix: extract_activation_directions."
            )
        return directions

    def made_gate(self, directions: Directions) -> Gate:
        """What `gate` returns, if it reads scores."""
        gate = self.gate(directions)
        if not isinstance(gate, Gate) or gate.reads != "scores":
            found = f"one that reads {gate.reads}" if isinstance(gate, Gate) else type(gate).__name__
            raise GradRouteError(
                f"`gate` should return a gate that reads scores. Found {found}. Fix: BandGate(directions) or "
                "ThresholdGate(...)."
            )
        return gate
