"""Error feedback around a code: what one message leaves out, the next one makes up for."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.federated.methods import State
from benchmarks.peers.federated.base import Peer
from benchmarks.peers.federated.downlink import States


class FeedbackPeer(Peer):
    """A peer whose clients keep what their messages left out.

        wanted = update + decay * residual --pack--> body;   residual <- wanted - unpack(body)

    A client that is rarely sampled adds a residual of many rounds ago; the papers assume that
    everyone takes part in every round.

    Args:
        initial, downlink, lr: as for ``Peer``.
        decay: how much of the residual is still wanted at the next message.
        feedback: off means ``residual = 0`` at all times.
    """

    def __init__(
        self,
        initial: State,
        downlink: States | None = None,
        *,
        decay: float = 1.0,
        feedback: bool = True,
        lr: float = 1.0,
    ) -> None:
        super().__init__(initial, downlink, lr=lr)
        self.decay, self.feedback = decay, feedback

    def pack(self, vector: Tensor) -> bytes:
        """The body that stands for a vector ``[n]``, as well as the code can."""
        raise NotImplementedError

    def unpack(self, body: bytes) -> Tensor:
        """The vector ``[n]`` that a body stands for."""
        raise NotImplementedError

    def encode(self, client: int, update: Tensor) -> bytes:
        """Code the update and what is owed; remember what is owed from now on."""
        memory = self.memory(client)
        wanted = update + self.decay * memory.residual
        body = self.pack(wanted)
        memory.residual = wanted - self.unpack(body) if self.feedback else torch.zeros_like(update)
        return body

    def decode(self, body: bytes) -> Tensor:
        """What the body stands for."""
        return self.unpack(body)
