"""What gradroute does with PEFT: a config, the layers behind it, checkpoints and exports.

No other folder of the core imports PEFT, which takes seconds: import this one where it is needed."""

from gradroute.adapters.peft._factory import build_routed_layer
from gradroute.adapters.peft.checkpoint import load_quarantined
from gradroute.adapters.peft.config import QuarantineLoraConfig
from gradroute.adapters.peft.export import export_deployed, export_full
from gradroute.adapters.peft.routed_lora import RoutedLoraLayer

QuarantineLoraConfig.layer_factory = staticmethod(build_routed_layer)

__all__ = ["QuarantineLoraConfig", "RoutedLoraLayer", "export_deployed", "export_full", "load_quarantined"]
