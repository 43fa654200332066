"""What the optimizer makes of a routed gradient, and what can be done about it.

With AdamW a gradient of zero still moves a weight. `audit_updates` shows it; `skip_idle_blocks` and the corrections
mend it."""

from gradroute.optim.audit import UpdateAudit, audit_updates
from gradroute.optim.corrections import decay_toward_start, project_updates, purge_moments
from gradroute.optim.idle_blocks import skip_idle_blocks

__all__ = [
    "UpdateAudit",
    "audit_updates",
    "decay_toward_start",
    "project_updates",
    "purge_moments",
    "skip_idle_blocks",
]
