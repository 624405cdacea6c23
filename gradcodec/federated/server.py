"""The server's side of federated averaging with codes in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.codecs.base import Codec, mean_shares
from gradcodec.errors import (
    CodecMismatchError,
    ConfigError,
    MalformedBodyError,
    NonFiniteError,
    TrainingError,
)
from gradcodec.federated.envelope import INCREMENT, SNAPSHOT, Broadcast, Reply
from gradcodec.federated.replica import Replica, Space, for_state
from gradcodec.representation import SENT, check
from gradcodec.types import Update, UpdateSpec
from gradcodec.wire import Payload

if TYPE_CHECKING:
    from gradcodec.federated.client import Client

AGGREGATIONS = ("mean", "sum")


@dataclass(frozen=True)
class ServerConfig:
    """How replies become the next global state.

    Attributes:
        mode: ``"post"`` (finished updates are encoded) or ``"latent"`` (codes were trained).
        representation: what clients send (see ``gradcodec.representation``); ``latent`` needs
            ``"update"``.
        aggregation: ``"mean"``, weighted by examples (McMahan et al., arXiv 1602.05629), or
            ``"sum"``, the literal reading of CG-FedLLM's Algorithm 1.
        lr: server learning rate on the aggregated update (the paper's eta).
        momentum: server momentum (FedAvgM, Hsu et al., arXiv 1909.06335); costs no bytes.
        feedback: keep what the broadcast's quantisation lost and add it to the next one.
    """

    mode: str = "post"
    representation: str = "update"
    aggregation: str = "mean"
    lr: float = 1.0
    momentum: float = 0.0
    feedback: bool = True

    def __post_init__(self) -> None:
        check(self.representation, SENT)
        if self.mode not in ("post", "latent"):
            raise ConfigError(f"expected mode 'post' or 'latent', got {self.mode!r}")
        if self.mode == "latent" and self.representation != "update":
            raise ConfigError(f"latent mode sends updates, got {self.representation!r}")
        if self.aggregation not in AGGREGATIONS:
            raise ConfigError(f"expected aggregation of {AGGREGATIONS}, got {self.aggregation!r}")
        if not (self.lr > 0 and 0 <= self.momentum < 1):
            raise ConfigError(
                f"expected lr > 0 and momentum in [0, 1), got {self.lr}, {self.momentum}"
            )
        plain = self.lr == 1.0 and self.momentum == 0.0
        if self.representation != "update" and not plain:
            raise ConfigError("server lr and momentum act on updates, not on states")


def space_of(downlink: Codec, config: ServerConfig) -> Space:
    """How broadcasts move a participant's replica under these settings."""
    absolute = config.representation != "update"
    return Space(downlink, latent=config.mode == "latent", absolute=absolute)


class Server:
    """Holds the global replica, collects replies, closes rounds.

    1. ``broadcast(version)`` -> bytes that bring a client from ``version`` to now
    2. ``receive(blob)``      <- bytes of a reply; a bad one raises and changes nothing
    3. ``close_round()``      aggregates, encodes the increment, applies what it decodes to

    Args:
        initial: the state that every participant derives by itself.
        uplink: codec of replies; it is bound to the initial state here (``for_state``).
        downlink: codec of broadcasts, likewise; the uplink codec by default. Latent mode needs the
            same code space in both directions (another quantiser is fine).
        config: aggregation settings.
    """

    def __init__(
        self,
        initial: Update,
        uplink: Codec,
        downlink: Codec | None = None,
        config: ServerConfig | None = None,
    ) -> None:
        self._begin(initial, uplink, downlink, config or ServerConfig())

    def _begin(
        self,
        initial: Update,
        uplink: Codec,
        downlink: Codec | None,
        config: ServerConfig,
        round: int = 0,
    ) -> None:
        """Start at a state with these codecs, as the state of a round."""
        self.config = config
        spec = UpdateSpec.of(initial)
        self.uplink = for_state(uplink, initial)
        self.downlink = self.uplink if downlink is None else for_state(downlink, initial)
        latent = self.config.mode == "latent"
        self.space = space_of(self.downlink, self.config)
        same = self.uplink.code_space == self.downlink.code_space
        if latent and not same:
            raise ConfigError(
                f"latent mode: {self.uplink} and {self.downlink} differ in code space"
            )
        # Codes are averaged as codes where both ends mean the same by them; else values are.
        self.codes_cross = latent or (same and self.space.in_code)
        self.replica = Replica(initial, self.space, round)
        self.increments: list[bytes] = []
        self._replies: dict[int, tuple[int, Tensor]] = {}
        size = self.uplink.code_numel(spec) if self.codes_cross else spec.numel
        self.momentum = torch.zeros(size)
        self.residual = torch.zeros(size)

    @property
    def round(self) -> int:
        """Number of closed rounds; the version of the global state."""
        return self.replica.version

    def client(self, number: int, version: int = 0) -> Client:
        """A client of this federation in this process, at the state of round ``version``.

        It shares the server's initial tensors; what it would have received before is not counted.
        """
        from gradcodec.federated.client import Client

        client = Client(number, self.replica.initial, self.uplink, self.downlink, self.config)
        client.replica.initial = self.replica.initial
        for blob in self.increments[:version]:
            client.replica.advance(Payload.from_bytes(blob))
        return client

    def broadcast(self, version: int = 0) -> bytes:
        """What a client at ``version`` needs to be at the current round, in the fewest bytes.

        Either the increments that it missed or one snapshot of the whole position; both are exact.
        """
        if not 0 <= version <= self.round:
            raise ConfigError(f"expected a version of 0..{self.round}, got {version}")
        if self.space.absolute:
            last = self.increments[-1:] if version < self.round else []
            return Broadcast(self.round, tuple((INCREMENT, b) for b in last)).to_bytes()
        missed = Broadcast(self.round, tuple((INCREMENT, b) for b in self.increments[version:]))
        if len(missed.parts) < 2:
            return missed.to_bytes()
        whole = Broadcast(self.round, ((SNAPSHOT, self.replica.snapshot().to_bytes()),))
        return min(missed.to_bytes(), whole.to_bytes(), key=len)

    @torch.no_grad()
    def receive(self, blob: bytes) -> Reply:
        """Take a reply of this round.

        Raises:
            WireError: the bytes are damaged, belong to another codec or round, or come twice.
            MalformedBodyError: the decoded values are not finite.
        """
        reply = Reply.from_bytes(blob)
        if reply.round != self.round:
            raise CodecMismatchError(
                f"client {reply.client}: expected a reply to round {self.round}, got {reply.round}"
            )
        if reply.client in self._replies:
            raise CodecMismatchError(f"client {reply.client}: a second reply in one round")
        value = self._read(reply)
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise MalformedBodyError(f"client {reply.client}: {bad} values are NaN or Inf")
        self._replies[reply.client] = (reply.examples, value)
        return reply

    def _read(self, reply: Reply) -> Tensor:
        if self.codes_cross:
            return self.uplink.read_code(reply.payload)
        return layout.flatten(self.uplink.decoder.decode(reply.payload), self.replica.spec)

    @torch.no_grad()
    def close_round(self) -> bytes:
        """Aggregate the replies into the next global state; returns the increment's bytes.

        Replies are added in the order of client ids, so arrival order does not matter.

        Raises:
            TrainingError: no reply was accepted, or the state would not be finite.
        """
        if not self._replies:
            raise TrainingError(f"round {self.round}: expected at least one good reply, got none")
        ordered = [self._replies[c] for c in sorted(self._replies)]
        shares = mean_shares(len(ordered), [examples for examples, _ in ordered])
        if self.config.aggregation == "sum":
            shares = [1.0] * len(ordered)
        total = torch.zeros_like(ordered[0][1])
        for (_, value), share in zip(ordered, shares, strict=True):
            total.add_(value, alpha=share)
        momentum = self.config.momentum * self.momentum + total
        wanted = self.config.lr * momentum + self.residual
        try:
            layout.check_finite(wanted, "aggregate")
            payload, sent = self._encode(wanted)
        except NonFiniteError as err:
            raise TrainingError(
                f"round {self.round}: the aggregated update diverged: {err}"
            ) from err
        self.momentum = momentum
        if self.config.feedback and not self.space.absolute:
            self.residual = wanted - sent
        blob = payload.to_bytes()
        self.replica.advance(payload)
        self.increments.append(blob)
        self._replies = {}
        return blob

    def _encode(self, value: Tensor) -> tuple[Payload, Tensor]:
        """Payload of an aggregated vector, and the vector that its receivers will see."""
        if self.codes_cross:
            payload = self.downlink.write_code(value, seed=self.round)
            return payload, self.downlink.read_code(payload)
        update = layout.unflatten(value, self.replica.spec)
        payload = self.downlink.encoder.encode(update, seed=self.round)
        return payload, layout.flatten(self.downlink.decoder.decode(payload), self.replica.spec)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as plain tensors."""
        out = {"momentum": self.momentum, "residual": self.residual}
        for i, blob in enumerate(self.increments):
            out[f"increment.{i:06d}"] = torch.frombuffer(bytearray(blob), dtype=torch.uint8)
        return out

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of ``state_dict``: replays the increments, which restores it to the bit.

        Raises:
            ConfigError, WireError: the state is another federation's; nothing is changed then.
        """
        for name in ("momentum", "residual"):
            size, came = len(self.momentum), state.get(name, torch.empty(0)).shape
            if tuple(came) != (size,):
                raise ConfigError(f"server state: expected {name} [{size}], got {list(came)}")
        replica = Replica(self.replica.initial, self.space)
        keys = sorted(k for k in state if k.startswith("increment."))
        increments = [state[key].numpy().tobytes() for key in keys]
        for blob in increments:
            replica.advance(Payload.from_bytes(blob))
        self.momentum, self.residual = state["momentum"].clone(), state["residual"].clone()
        self.replica, self.increments, self._replies = replica, increments, {}
