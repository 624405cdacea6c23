"""Bytes between the ranks of one group, always by an uneven all-to-all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gradcodec.distributed.meter import Meter
from gradcodec.errors import ConfigError, TrainingError

_TAG = 1 << 30
"""The tags of our sends and receives start here, apart from those of the caller's own messages.

A message's length is added to its tag. Gloo aborts a process that gets more bytes than it expects.
A message of another length has another tag, so gloo keeps waiting for the right one until the
group's timeout, which is an error.
"""


class Link:
    """Swaps bytes between the ranks of a group. One link is used by one thread.

    Everything that the package exchanges is an all-to-all of uint8 with uneven splits. On gloo it
    is made of sends and receives, and the receives are posted first. (In gloo's own
    ``all_to_all_single``, a rank that is already sending permits the other to send only after its
    own payload. In a quarter of the calls at 100 Mbit/s the two directions of a link therefore take
    turns, which takes twice the time.)

    Args:
        group: the process group; ``None`` is the default group.
        device: where the tensors are. Bytes travel from this device if the group has a backend that
            can send them, else through host memory (gloo with CUDA tensors).

    Raises:
        ConfigError: this process is not in the group, or the group cannot carry such tensors.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self.rank, self.size = place(group)
        self.device = carrier(group, device)
        over_gloo = getattr(group, "over_gloo", False)  # as ``group.CompressedGroup`` is
        self._gloo = over_gloo or backends_of(group).get(self.device.type) == "gloo"
        self.meter = Meter()

    def swap(self, messages: list[list[Tensor]], sizes: list[int]) -> list[Tensor]:
        """Send ``messages[r]`` to rank ``r`` and return what came from each, uint8 ``[sizes[r]]``.

        Args:
            messages: for each rank, a list of one or more uint8 tensors that are sent one after the
                other; all on one device. This rank's message to itself is returned as it is.
            sizes: number of bytes that each rank sends here.

        Raises:
            TrainingError: the collective failed: a rank died, or did not come in time.
        """
        if self.size == 1:
            return [torch.cat(messages[0])]
        # Often one message goes to everyone; it is joined only once.
        whole = {id(m): torch.cat(m) for m in messages}
        own = whole[id(messages[self.rank])]
        came = [0 if r == self.rank else n for r, n in enumerate(sizes)]
        staged = self.device.type == "cpu" and own.is_cuda
        sent = [
            own[:0].to(self.device)
            if r == self.rank
            else (_pinned(whole[id(m)]) if staged else whole[id(m)].to(self.device))
            for r, m in enumerate(messages)
        ]
        gone = [len(part) for part in sent]
        received = torch.empty(sum(came), dtype=torch.uint8, device=self.device, pin_memory=staged)
        try:
            with self.meter.phase("exchange"):
                if self._gloo:
                    self._pairwise(torch.split(received, came), sent)
                else:
                    everything = torch.cat(sent)
                    dist.all_to_all_single(received, everything, came, gone, group=self.group)
        except RuntimeError as err:
            raise TrainingError(
                f"rank {self.rank} of {self.size}: an exchange of compressed gradients failed; "
                "another rank has died, did not come within the group's timeout, or came with "
                f"another call or another version of gradcodec ({err})"
            ) from err
        self.meter.wire += sum(gone)
        parts = list(torch.split(received.to(own.device), came))
        parts[self.rank] = own
        return parts

    def _pairwise(self, received: Sequence[Tensor], sent: Sequence[Tensor]) -> None:
        """Exchange with all other ranks at once, the next higher rank first."""
        others = [(self.rank + k) % self.size for k in range(1, self.size)]
        works = [
            dist.irecv(received[r], group=self.group, group_src=r, tag=_tag(received[r]))
            for r in others
            if len(received[r])
        ]
        works += [
            dist.isend(sent[r], group=self.group, group_dst=r, tag=_tag(sent[r]))
            for r in others
            if len(sent[r])
        ]
        for work in works:
            assert work is not None
            work.wait()


def _pinned(message: Tensor) -> Tensor:
    """A copy of a CUDA tensor in page-locked host memory, which copies several times faster."""
    there = torch.empty(len(message), dtype=torch.uint8, pin_memory=True)
    return there.copy_(message)


def _tag(message: Tensor) -> int:
    return _TAG + len(message) % _TAG


def control_link(group: dist.ProcessGroup | None) -> Link:
    """A link for the handshake; its device does not depend on the tensors a rank was given."""
    place(group)
    backends = backends_of(group)
    device = "cpu" if "cpu" in backends else next(iter(backends))
    return Link(group, torch.device(device))


def place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank in the group and its size.

    Raises:
        ConfigError: there is no group yet, or this process is not in it.
    """
    if not dist.is_initialized():
        raise ConfigError("torch.distributed is not initialised: call init_process_group first")
    try:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
    except (ValueError, TypeError, AttributeError, RuntimeError) as err:
        raise ConfigError(
            f"expected a process group, got {group!r}: of a mesh, pass mesh.get_group()"
        ) from err
    if rank < 0:
        raise ConfigError("expected a process_group that this process is a member of")
    return rank, size


def carrier(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """The device that bytes of tensors on ``device`` travel from."""
    backends = backends_of(group)
    backend = backends.get(device.type)
    if backend is not None and not (backend == "gloo" and device.type != "cpu"):
        return device
    if "cpu" in backends:
        return torch.device("cpu")
    raise ConfigError(f"expected a group that can carry {device.type} tensors, got {backends}")


def backends_of(group: dist.ProcessGroup | None) -> dict[str, str]:
    """The backends of a group, by device type."""
    # "cpu:gloo,cuda:nccl", or a bare backend name from older groups.
    pairs = [p.split(":") for p in str(dist.get_backend_config(group)).split(",")]
    return {p[0]: p[-1] for p in pairs}
