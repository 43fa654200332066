"""TRL's GRPO with routed gradients: `GradRouteGRPOTrainer`, or `GradRouteMixin` before a subclass of `GRPOTrainer`."""

from gradroute.adapters.peft.config import QuarantineLoraConfig
from gradroute.integrations.trl.options import directions_from
from gradroute.integrations.trl.trainer import GradRouteGRPOTrainer, GradRouteMixin

__all__ = ["GradRouteGRPOTrainer", "GradRouteMixin", "QuarantineLoraConfig", "directions_from"]
