"""The base of all peers: both ends of a federation around a code of update vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.federated.methods import State
from benchmarks.peers.federated.downlink import States, raw_fp32, read_fp32
from benchmarks.peers.federated.envelope import Reply
from gradcodec import layout
from gradcodec.codec import mean_shares
from gradcodec.errors import (
    CodecMismatchError,
    EmptyClientError,
    MalformedBodyError,
    NonFiniteError,
    TrainingError,
)
from gradcodec.types import UpdateSpec


@dataclass
class Memory:
    """What one client keeps between rounds.

    Attributes:
        held: the global vector as the client decoded it.
        version: the round that ``held`` is of.
        residual: what its messages have left out so far; stays zero without error feedback.
    """

    held: Tensor
    version: int
    residual: Tensor


class Peer:
    """A published method as a ``federated.methods.Method``; by itself FedAvg in raw fp32.

        server                             client
        1. broadcast(client) --bytes-->    2. arrive(client, bytes) -> state to train from
                                           3. reply(client, ...): encode(end - held)
        4. receive(bytes): decode  <--bytes--
        5. close_round(): mean by examples, one step of the global vector

    Steps 1, 4 and 5 touch only the server's fields, 2 and 3 only ``memory(client)``: two instances
    of one peer, with bytes going between them, do what one does (``tests/benchmarks``). A subclass
    overrides ``encode`` and ``decode``, and hands another downlink than fp32 states over.

    Args:
        initial: the state that every participant derives from a seed.
        downlink: how the global vector reaches clients; exact fp32 states by default, for papers
            that compress the uplink only.
        lr: server step on the mean update.
    """

    codec_bytes = 0

    def __init__(self, initial: State, downlink: States | None = None, *, lr: float = 1.0) -> None:
        self.spec = UpdateSpec.of(initial)
        self.start = flat(initial)
        self.downlink = downlink or States(self.start)
        self.lr = lr
        self._sent_to: dict[int, int] = {}
        self._memories: dict[int, Memory] = {}
        self._replies: dict[int, tuple[int, Tensor]] = {}

    @property
    def round(self) -> int:
        """Number of closed rounds; the version of the global vector."""
        return self.downlink.version

    def memory(self, client: int) -> Memory:
        """A client's own side, made at its first round."""
        if client not in self._memories:
            zeros = torch.zeros_like(self.start)
            self._memories[client] = Memory(self.downlink.first(), 0, zeros)
        return self._memories[client]

    # What a subclass overrides

    def encode(self, client: int, update: Tensor) -> bytes:
        """Client: the body that stands for its update ``[n]``."""
        return raw_fp32(update)

    def decode(self, body: bytes) -> Tensor:
        """Server: an update ``[n]`` from a body."""
        return read_fp32(body, self.start.numel())

    def read(self, reply: Reply) -> Tensor:
        """Server: an update ``[n]`` from a reply, where its header is needed too."""
        return self.decode(reply.body)

    def begin(self, client: int) -> Tensor:
        """Client: the vector ``[n]`` to train from."""
        return self.memory(client).held

    def aggregate(self, replies: Mapping[int, tuple[int, Tensor]]) -> Tensor:
        """Server: the mean update, weighted by examples; replies in the order of client ids."""
        shares = mean_shares(len(replies), [examples for examples, _ in replies.values()])
        total = torch.zeros_like(self.start)
        for (_, update), share in zip(replies.values(), shares, strict=True):
            total.add_(update, alpha=share)
        return total

    # What the benchmark calls

    def deliver(self, client: int) -> tuple[bytes, State]:
        """The bytes that bring a client to the current round, and the state it trains from."""
        blob = self.broadcast(client)
        return blob, self.arrive(client, blob)

    def broadcast(self, client: int) -> bytes:
        """Server: what this client needs; whom it sent what it knows."""
        blob = self.downlink.broadcast(self._sent_to.get(client, 0))
        self._sent_to[client] = self.round
        return blob

    @torch.no_grad()
    def arrive(self, client: int, blob: bytes) -> State:
        """Client: take a broadcast.

        Raises:
            WireError: the bytes are damaged or do not fit; the client is then as before.
        """
        memory = self.memory(client)
        memory.version, memory.held = self.downlink.arrive(memory.held, memory.version, blob)
        # A copy: whoever trains may do so in place.
        return layout.unflatten(self.begin(client).clone(), self.spec)

    def optimizer(
        self,
        client: int,
        parameters: Mapping[str, nn.Parameter],
        cls: type[torch.optim.Optimizer],
        **options: Any,
    ) -> torch.optim.Optimizer:
        """The plain one."""
        return cls(list(parameters.values()), **options)

    @torch.no_grad()
    def reply(self, client: int, optimizer: torch.optim.Optimizer, end: State, n: int) -> bytes:
        """Client: its update since the broadcast, coded, in the reply's envelope.

        Raises:
            EmptyClientError: no examples.
            NonFiniteError: training diverged to NaN or Inf.
            UpdateError: names, shapes or dtypes are not the state's.
        """
        if n < 1:
            raise EmptyClientError(f"client {client}: expected at least one example, got none")
        self.spec.check(end)
        memory = self.memory(client)
        update = layout.flatten(end, self.spec) - memory.held
        layout.check_finite(update, f"client {client}")
        return Reply(client, memory.version, n, self.encode(client, update)).to_bytes()

    @torch.no_grad()
    def receive(self, blob: bytes) -> None:
        """Server: take a reply of this round; a bad one raises and changes nothing.

        Raises:
            WireError: the bytes are damaged, of another round, or come twice.
        """
        reply = Reply.from_bytes(blob)
        if reply.round != self.round:
            raise CodecMismatchError(
                f"client {reply.client}: expected a reply to round {self.round}, got {reply.round}"
            )
        if reply.client in self._replies:
            raise CodecMismatchError(f"client {reply.client}: a second reply in one round")
        update = self.read(reply)
        bad = int((~torch.isfinite(update)).sum())
        if bad:
            raise MalformedBodyError(f"client {reply.client}: {bad} values are NaN or Inf")
        self._replies[reply.client] = (reply.examples, update)

    @torch.no_grad()
    def close_round(self) -> None:
        """Server: one step by the mean update.

        Raises:
            TrainingError: no reply was accepted, or the global vector would not be finite.
        """
        if not self._replies:
            raise TrainingError(f"round {self.round}: expected at least one good reply, got none")
        step = self.lr * self.aggregate(dict(sorted(self._replies.items())))
        try:
            layout.check_finite(self.downlink.vector + step, "global vector")
        except NonFiniteError as err:
            raise TrainingError(f"round {self.round}: training diverged: {err}") from err
        self.downlink.move(step)
        self._replies = {}

    def state(self) -> State:
        """The server's global state."""
        return layout.unflatten(self.downlink.vector.clone(), self.spec)


def flat(state: State) -> Tensor:
    """All values of a state as one fp32 vector ``[n]``."""
    return layout.flatten(state, UpdateSpec.of(state))
