"""verl: `register(...)` in a module that `actor_rollout_ref.model.external_lib` names puts a routed engine in its place.

The engine is verl's own for FSDP2; verl is imported when `register` is called.
"""

from gradroute.integrations.verl.registration import register
from gradroute.integrations.verl.settings import RoutingSettings

__all__ = ["RoutingSettings", "register"]
