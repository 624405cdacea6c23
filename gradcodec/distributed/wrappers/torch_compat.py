"""Process groups: what torch has no public name for."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


def _timeout_of(group: dist.ProcessGroup | None) -> timedelta | None:
    """How long the group's collectives wait; ``None`` if its backend does not say."""
    found = group or dist.distributed_c10d._get_default_group()
    for device in sorted(found._device_types, key=str):
        options = getattr(found._get_backend(torch.device(device)), "options", None)
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return None


def sister_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """A new group of the same ranks, backends and timeout; all members must call this.

    If the group is a part of the world, the other processes need not take part.
    """
    ranks = dist.get_process_group_ranks(group or dist.distributed_c10d._get_default_group())
    whole = len(ranks) == dist.get_world_size()
    made = dist.new_group(
        None if whole else ranks,
        timeout=_timeout_of(group),
        backend=str(dist.get_backend_config(group)),
        use_local_synchronization=not whole,
        group_desc="gradcodec",
    )
    assert isinstance(made, dist.ProcessGroup)
    return made
