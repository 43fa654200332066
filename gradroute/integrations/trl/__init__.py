"""TRL's GRPO with routed gradients: `GradRouteGRPOTrainer`, or `GradRouteMixin` before a subclass of `GRPOTrainer`."""

from gradroute.integrations.trl.trainer import GradRouteGRPOTrainer, GradRouteMixin

__all__ = ["GradRouteGRPOTrainer", "GradRouteMixin"]
