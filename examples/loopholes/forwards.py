"""What an arm changes in the forward while it trains: in the rollouts, in the loss, or in both."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import nn

from .arm import Arm
from .environment import Environment
from .inoculation import lesson
from .soft_prompt import as_far, learned_prompt, prompted
from .steering import hidden_states_changed, residual_directions, shifts

Change = Callable[[], AbstractContextManager[None]]


class _Settings(Protocol):
    pairs_per_mode: int
    prompt_steps: int
    steering: float
    ablated_directions: int


@dataclass(frozen=True)
class Forwards:
    """Contexts around sampling and around the loss, and what the change gained where it was learned."""

    sampling: Change = nullcontext
    loss: Change = nullcontext
    gained_nats: float | None = None


def changed_forwards(model: nn.Module, environment: Environment, arm: Arm, recipe: _Settings, seed: int) -> Forwards:
    """The changes of `arm`, made of the monitored modes' pairs and of the model as it is now."""
    random = arm.random_direction != "no"
    if arm.forward in ("prompted", "recontextualised"):
        taught = lesson(environment, "hacks", recipe.pairs_per_mode, seed)
        embedding, gained = learned_prompt(model, *taught, recipe.prompt_steps)
        change = partial(prompted, model, as_far(model, embedding, seed) if random else embedding)
        return Forwards(change if arm.forward == "prompted" else nullcontext, change, gained)
    if arm.forward in ("steered", "ablated directions"):
        k = recipe.ablated_directions if arm.forward == "ablated directions" else 1
        directions = residual_directions(model, environment, recipe.pairs_per_mode, k, seed, random=random)
        if arm.forward == "steered":
            change = partial(hidden_states_changed, model, added=shifts(directions, recipe.steering))
        else:
            change = partial(hidden_states_changed, model, ablated=directions.rows)
        return Forwards(change, change)
    return Forwards()
