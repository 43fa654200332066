"""verl: `register(...)`, in a module that `actor_rollout_ref.model.external_lib` names, has it train by routing.

The engine is verl's own for FSDP2; verl is imported when `register` is called.
"""

from gradroute.integrations.verl.registration import register
from gradroute.integrations.verl.settings import RoutingSettings

__all__ = ["RoutingSettings", "register"]
