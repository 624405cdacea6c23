"""The interface of a way to send updates, and this project's codecs behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradcodec.codec import Codec
from gradcodec.faf import LatentOptimizer
from gradcodec.federated import Client, Server, ServerConfig

State = dict[str, Tensor]


class Method(Protocol):
    """Both ends of a federation under one scheme; every message really is bytes.

    The benchmark calls, in each round: ``deliver`` and ``optimizer`` for every sampled client,
    trains, ``reply`` and ``receive`` for each, then ``close_round``. What a client remembers
    between rounds (its version, error feedback) the method keeps by client number.
    """

    codec_bytes: int
    """What each participant downloads once before its first round, beside the base model."""

    def deliver(self, client: int) -> tuple[bytes, State]:
        """The bytes that bring a client to the current round, and the state it decodes there."""

    def optimizer(
        self,
        client: int,
        parameters: Mapping[str, nn.Parameter],
        cls: type[torch.optim.Optimizer],
        **options: Any,
    ) -> torch.optim.Optimizer:
        """The client's optimiser for this round; ``parameters`` hold the delivered state."""

    def reply(self, client: int, optimizer: torch.optim.Optimizer, end: State, n: int) -> bytes:
        """The bytes of a client's answer after training on ``n`` examples arrived at ``end``."""

    def receive(self, blob: bytes) -> None:
        """The server takes an answer; it may use nothing of the client's but these bytes."""

    def close_round(self) -> None:
        """Aggregate what was received, weighted by examples, into the next global state."""

    def state(self) -> State:
        """The server's global state: what is evaluated."""


class Coded:
    """This project's codecs, through its own ``Server`` and ``Client``."""

    def __init__(
        self,
        initial: State,
        uplink: Codec,
        downlink: Codec | None = None,
        config: ServerConfig | None = None,
        *,
        codec_bytes: int = 0,
    ) -> None:
        self._begin(Server(initial, uplink, downlink, config), codec_bytes)

    @classmethod
    def of(cls, server: Server) -> Coded:
        """Around a server of another kind (``AutoServer``)."""
        made = cls.__new__(cls)
        made._begin(server, 0)
        return made

    def _begin(self, server: Server, codec_bytes: int) -> None:
        self.server = server
        self.clients: dict[int, Client] = {}
        self.codec_bytes = codec_bytes

    def deliver(self, client: int) -> tuple[bytes, State]:
        """Increments that the client missed, or a snapshot."""
        server = self.server
        if client not in self.clients:
            self.clients[client] = server.client(client)
        blob = server.broadcast(self.clients[client].version)
        return blob, dict(self.clients[client].receive(blob))

    def optimizer(
        self,
        client: int,
        parameters: Mapping[str, nn.Parameter],
        cls: type[torch.optim.Optimizer],
        **options: Any,
    ) -> torch.optim.Optimizer:
        """The latent optimiser in latent mode, else the plain one."""
        if self.server.config.mode == "latent":
            return LatentOptimizer(parameters, self.clients[client].codec, cls, **options)
        return cls(list(parameters.values()), **options)

    def reply(self, client: int, optimizer: torch.optim.Optimizer, end: State, n: int) -> bytes:
        """A payload in the reply's envelope."""
        trained = optimizer if isinstance(optimizer, LatentOptimizer) else end
        return self.clients[client].reply(trained, n)

    def receive(self, blob: bytes) -> None:
        """Checked and decoded by the server."""
        self.server.receive(blob)

    def close_round(self) -> None:
        """Aggregate and encode the increment."""
        self.server.close_round()

    def state(self) -> State:
        """The server's replica."""
        return dict(self.server.replica.state())
