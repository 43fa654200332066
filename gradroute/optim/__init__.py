"""Audits of the steps that an optimizer takes with routed gradients, and corrections to them.

With AdamW a gradient of zero still moves a weight. `audit_updates` shows it; `skip_idle_blocks` and the corrections
mend it. `slow_start` holds the deployed block back for the first steps; `block_groups` makes the groups for it. All but
these groups and `purge_moments`, which acts once, are handles that end with `close()` or with their optimizer.
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
from gradroute.optim.slow_start import SlowStart, block_groups, slow_start

__all__ = [
    "BlockUpdate",
    "DecayTowardStart",
    "IdleBlockSkip",
    "SlowStart",
    "UpdateAudit",
    "UpdateAudits",
    "UpdateProjection",
    "audit_updates",
    "block_groups",
    "decay_toward_start",
    "project_updates",
    "purge_moments",
    "skip_idle_blocks",
    "slow_start",
]
