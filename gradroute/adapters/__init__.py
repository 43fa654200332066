"""Where gradients may land: layers with a deployed and a quarantine block, masks, routes and views.

`attach` or `QuarantineLoraConfig` puts the blocks in, `route` says which rows train which block, `ablate_quarantine`
and `disable_adapters` show the model without the quarantine or without both blocks, `export_deployed` and
`merge_deployed` ship it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradroute.adapters import init as init
from gradroute.adapters.attach import (
    ParameterSummary,
    attach,
    deployed_parameters,
    detach,
    parameter_summary,
    quarantine_parameters,
)
from gradroute.adapters.check import Finding, check_model
from gradroute.adapters.frozen import frozen_quarantine
from gradroute.adapters.layer import QuarantineLoRA, quarantine_lora
from gradroute.adapters.mask import RouteMask
from gradroute.adapters.merge import merge_deployed
from gradroute.adapters.pending import PendingMask
from gradroute.adapters.route import clear_route, route, set_route
from gradroute.adapters.svd_gain import SvdGain
from gradroute.adapters.views import ablate_quarantine, disable_adapters

if TYPE_CHECKING:
    from gradroute.adapters.peft import QuarantineLoraConfig, export_deployed, export_full, load_quarantined

_LAZY = {"QuarantineLoraConfig", "export_deployed", "export_full", "load_quarantined"}
"""peft takes seconds to import, and not everybody needs it."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module("gradroute.adapters.peft"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "Finding",
    "ParameterSummary",
    "PendingMask",
    "QuarantineLoRA",
    "QuarantineLoraConfig",
    "RouteMask",
    "SvdGain",
    "ablate_quarantine",
    "attach",
    "check_model",
    "clear_route",
    "deployed_parameters",
    "detach",
    "disable_adapters",
    "export_deployed",
    "export_full",
    "frozen_quarantine",
    "load_quarantined",
    "merge_deployed",
    "parameter_summary",
    "quarantine_lora",
    "quarantine_parameters",
    "route",
    "set_route",
]
