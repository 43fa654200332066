"""TRL's GRPO with routed gradients: `GradRouteGRPOTrainer`, or `GradRouteMixin` before a subclass of `GRPOTrainer`.

The keywords of the trainer say by what it routes; `Routing` is what they were resolved to, as `trainer.routing`. Those
that are values are fields of `GradRouteGRPOConfig` too.
"""

from gradroute.adapters.peft.config import QuarantineLoraConfig
from gradroute.integrations.trl.grpo_config import GradRouteGRPOConfig
from gradroute.integrations.trl.routing import Routing, directions_from
from gradroute.integrations.trl.trainer import GradRouteGRPOTrainer, GradRouteMixin

__all__ = [
    "GradRouteGRPOConfig",
    "GradRouteGRPOTrainer",
    "GradRouteMixin",
    "QuarantineLoraConfig",
    "Routing",
    "directions_from",
]
