"""FFA-LoRA: A stays what it was initialised to, B alone is trained and sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.federated.methods import State
from benchmarks.peers.federated.base import Peer
from gradcodec.errors import ConfigError
from gradcodec.types import UpdateSpec

FROZEN = "lora_A.weight"


class FFALoRA(Peer):
    """Federated Freeze-A LoRA (Sun et al., arXiv 2403.12313).

        A: from the seed, at all participants, forever
        B: trained, fp32 in both directions

    What is no ``lora_A`` is trained and sent. With A frozen the mean of the products ``B A`` is the
    product of the mean, which is the method's point beside halving the bytes. Deviations: the
    paper's privacy noise and its orthogonal initialisation of A are left out (A is whatever the
    benchmark's initial state holds), and the mean is weighted by examples. B alone may want another
    learning rate than A and B together.

    Args:
        initial: the state that every participant derives from a seed.
        lr: server step on the mean update.
    """

    def __init__(self, initial: State, *, lr: float = 1.0) -> None:
        self.frozen = {n: t.detach().clone() for n, t in initial.items() if n.endswith(FROZEN)}
        self.names = list(initial)
        self.whole = UpdateSpec.of(initial)
        trained = {n: t for n, t in initial.items() if n not in self.frozen}
        if not (self.frozen and trained):
            raise ConfigError(f"expected LoRA factors, one kind named *.{FROZEN}, got {self.names}")
        super().__init__(trained, lr=lr)

    def arrive(self, client: int, blob: bytes) -> State:
        """B from the bytes, A from the seed."""
        return self._merged(super().arrive(client, blob))

    def optimizer(
        self,
        client: int,
        parameters: Mapping[str, nn.Parameter],
        cls: type[torch.optim.Optimizer],
        **options: Any,
    ) -> torch.optim.Optimizer:
        """The plain one, on what is not frozen."""
        return cls([p for n, p in parameters.items() if n not in self.frozen], **options)

    def reply(self, client: int, optimizer: torch.optim.Optimizer, end: State, n: int) -> bytes:
        """B alone."""
        self.whole.check(end)
        trained = {name: t for name, t in end.items() if name not in self.frozen}
        return super().reply(client, optimizer, trained, n)

    def state(self) -> State:
        """The server's B with everyone's A."""
        return self._merged(super().state())

    def _merged(self, trained: State) -> State:
        return {
            name: trained[name] if name in trained else self.frozen[name].clone()
            for name in self.names
        }
