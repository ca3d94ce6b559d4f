"""What becomes of a run whose checkpoint or result could not be written; all ranks decide alike."""

from __future__ import annotations

from finetune.processes.groups import ProcessGroups
from finetune.storage.disk_failures import describe_disk_failure


def find_joint_reason(error: Exception, groups: ProcessGroups) -> str | None:
    """Why the disk refused, the same on all ranks; None where another kind of fault stopped a rank.

    Args:
        error: What a step that all ranks take together has raised, here and on every other rank.
        groups: All ranks call this.
    """
    reasons: list[str | None] = groups.world.gather_objects(describe_disk_failure(error))
    return next((reason for reason in reasons if reason), None)
