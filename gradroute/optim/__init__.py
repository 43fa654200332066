"""Audits of the steps that an optimizer takes with routed gradients, and corrections to them.

With AdamW a gradient of zero still moves a weight. `audit_updates` shows it; `skip_idle_blocks` and the corrections
mend it. All but `purge_moments`, which acts once, return a handle that ends with `close()` or with its optimizer.
"""

from gradroute.optim.audit import BlockUpdate, UpdateAudit, UpdateAudits, audit_updates
from gradroute.optim.corrections import (
    DecayTowardStart,
    UpdateProjection,
    decay_toward_start,
    project_updates,
    purge_moments,
)
from gradroute.optim.idle_blocks import IdleBlockSkip, skip_idle_blocks

__all__ = [
    "BlockUpdate",
    "DecayTowardStart",
    "IdleBlockSkip",
    "UpdateAudit",
    "UpdateAudits",
    "UpdateProjection",
    "audit_updates",
    "decay_toward_start",
    "project_updates",
    "purge_moments",
    "skip_idle_blocks",
]
