"""Anchors for ranks that are new, or come back, from a rank that went on training."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gradcodec.distributed.anchors import Anchors
from gradcodec.distributed.exchange.agreement import LinkChannel
from gradcodec.distributed.exchange.link import Link, control_link
from gradcodec.distributed.meter import Traffic

_POSITION = struct.Struct("<QQ")


@dataclass(frozen=True, order=True)
class Position:
    """How far a rank is: of two ranks the one with more steps, then more merges, is ahead."""

    step: int = 0
    merged: int = 0


def catch_up(
    anchors: Anchors, mine: Position, group: dist.ProcessGroup | None, device: torch.device
) -> tuple[Position, bool, Traffic]:
    """Give the anchors and momenta of the rank that is ahead to all that are behind.

    If several are ahead of the rest, the first of them sends. All ranks of the group call this.

    Args:
        anchors: of this rank; overwritten if it is behind.
        mine: how far this rank is.
        group: the ranks.
        device: the device that tensors travel from.

    Returns:
        How far all ranks are now, whether this one was behind, and what it sent.

    Raises:
        TrainingError: a rank is gone.
    """
    channel = LinkChannel(control_link(group))
    told = channel.gather(_POSITION.pack(mine.step, mine.merged), [_POSITION.size] * channel.size)
    found = [Position(*_POSITION.unpack(part)) for part in told]
    ahead = max(found)
    source, behind = found.index(ahead), [position < ahead for position in found]
    link = Link(group, device)
    if any(behind) and link.size > 1:
        tensors = list(anchors.tensors().values())
        nbytes = sum(t.numel() * t.element_size() for t in tensors)
        nothing = [torch.empty(0, dtype=torch.uint8, device=device)]
        blob = [torch.cat([_bytes(t).to(device) for t in tensors])] if tensors else nothing
        sends, receives = link.rank == source, behind[link.rank]
        messages = [blob if sends and late else nothing for late in behind]
        sizes = [nbytes if receives and r == source else 0 for r in range(link.size)]
        came = link.swap(messages, sizes)[source]
        if receives:
            parts = torch.split(came, [t.numel() * t.element_size() for t in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                # A copy, because a part may begin where its dtype cannot.
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))
    return ahead, behind[link.rank], link.meter.traffic + channel.link.meter.traffic


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
