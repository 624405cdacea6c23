"""Bytes between the ranks of one group: a single uneven all-to-all, and nothing else."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gradcodec.distributed.traffic import Meter
from gradcodec.errors import ConfigError, TrainingError


class Link:
    """A group, seen as a thing that swaps bytes. One link is used by one thread.

    Every collective of the package is an ``all_to_all_single`` of uint8 with uneven splits: gloo
    has no uneven all-gather and no int16, and every backend has this one.

    Args:
        group: the process group; ``None`` is the default group.
        device: where the tensors are. Bytes travel there if the group has a backend for it that
            can, else through host memory (gloo under CUDA tensors).

    Raises:
        ConfigError: this process is not in the group, or the group cannot carry such tensors.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        if self.rank < 0:
            raise ConfigError("expected a group that this process is a member of")
        self.device = carrier(group, device)
        self.meter = Meter()

    def swap(self, messages: list[list[Tensor]], sizes: list[int]) -> list[Tensor]:
        """Send ``messages[r]`` to rank ``r`` and return what came from each, uint8 ``[sizes[r]]``.

        Args:
            messages: for each rank, uint8 tensors that are sent one after the other, at least one;
                all on one device. The own message counts for nothing.
            sizes: what each rank sends here.

        Raises:
            TrainingError: the collective failed: a rank died, or did not come in time.
        """
        own = torch.cat(messages[self.rank])
        if self.size == 1:
            return [own]
        others = [m for r, m in enumerate(messages) if r != self.rank]
        gone = [0 if r == self.rank else sum(map(len, m)) for r, m in enumerate(messages)]
        came = [0 if r == self.rank else n for r, n in enumerate(sizes)]
        sent = torch.cat([part for m in others for part in m]).to(self.device)
        received = torch.empty(sum(came), dtype=torch.uint8, device=self.device)
        try:
            with self.meter.phase("exchange"):
                dist.all_to_all_single(received, sent, came, gone, group=self.group)
        except RuntimeError as err:
            raise TrainingError(
                f"rank {self.rank} of {self.size}: an exchange of compressed gradients failed; "
                f"another rank has died or did not come within the group's timeout ({err})"
            ) from err
        self.meter.wire += sum(gone)
        parts = list(torch.split(received.to(own.device), came))
        parts[self.rank] = own
        return parts


def carrier(group: dist.ProcessGroup | None, device: torch.device) -> torch.device:
    """The device that bytes of tensors on ``device`` travel from."""
    # "cpu:gloo,cuda:nccl", or a bare backend name from older groups.
    config = str(dist.get_backend_config(group))
    pairs = [p.split(":") for p in config.split(",")]
    backends = {p[0]: p[-1] for p in pairs}
    backend = backends.get(device.type)
    if backend is not None and not (backend == "gloo" and device.type != "cpu"):
        return device
    if "cpu" in backends:
        return torch.device("cpu")
    raise ConfigError(f"expected a group that can carry {device.type} tensors, got {config}")
