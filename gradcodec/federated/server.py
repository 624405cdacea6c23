"""The server's side of federated averaging with codes in both directions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.codec import Codec, mean_shares
from gradcodec.errors import (
    CodecMismatchError,
    ConfigError,
    MalformedBodyError,
    NonFiniteError,
    TrainingError,
    UnexpectedReplyError,
)
from gradcodec.federated.config import ServerConfig, codecs_for, space_of
from gradcodec.federated.envelope import (
    INCREMENT,
    SNAPSHOT,
    VALUES,
    Broadcast,
    Part,
    Reply,
    part_nbytes,
)
from gradcodec.federated.participants import ClientId, client_id, in_order
from gradcodec.federated.replica import WAY_BACK, Replica
from gradcodec.federated.tensors import (
    KeptMean,
    Split,
    State,
    check_kept,
    check_rules,
    split,
)
from gradcodec.wire import Payload

if TYPE_CHECKING:
    from gradcodec.federated.client import Client

logger = logging.getLogger("gradcodec.federated")

STATE_FORMAT = 2


@dataclass(frozen=True)
class _Step:
    """What closing a round leads to."""

    increment: bytes
    momentum: Tensor
    residual: Tensor
    replica: Replica


class Server:
    """Holds the global replica, collects replies, closes rounds.

    1. ``invite(clients)``       names who may reply; without it anybody may
    2. ``broadcast(version)`` -> bytes that bring a client from ``version`` to now
    3. ``receive(blob)``      <- bytes of a reply; a bad one raises and changes nothing
    4. ``close_round()``         aggregates, encodes the increment, applies what it decodes to

    A round holds its replies as the bytes that came, at most ``config.max_replies`` of them.

    Args:
        initial: the state that every participant derives by itself: a module, or tensors by name.
        uplink: codec of replies; it is bound to the initial state here (``for_state``).
        downlink: codec of broadcasts, likewise; the uplink codec by default. Latent mode needs the
            same code space in both directions (another quantiser is fine).
        config: aggregation settings.

    Raises:
        ConfigError, UpdateError: a tensor cannot travel as the codecs and rules say; the message
            names it.
    """

    def __init__(
        self,
        initial: State,
        uplink: Codec,
        downlink: Codec | None = None,
        config: ServerConfig | None = None,
    ) -> None:
        config = config or ServerConfig()
        parts = split(initial, config.rules)
        check_rules(config.rules, parts.names)
        self._begin(parts, uplink, downlink, config)

    def _begin(
        self,
        parts: Split,
        uplink: Codec,
        downlink: Codec | None,
        config: ServerConfig,
        round: int = 0,
    ) -> None:
        """Start at a state with these codecs, as the state of a round."""
        self.config = config
        self.uplink, self.downlink = codecs_for(parts.coded, uplink, downlink, config)
        latent = self.config.mode == "latent"
        self.space = space_of(self.downlink, self.config)
        same = self.uplink.code_space == self.downlink.code_space
        if latent and not same:
            raise ConfigError(
                f"latent mode: {self.uplink} and {self.downlink} differ in code space"
            )
        # Codes are averaged as codes where both ends mean the same by them; else values are.
        self.codes_cross = latent or (same and self.space.in_code)
        self.replica = Replica(parts.whole, self.space, round)
        self.increments: list[bytes] = []
        self.kept_since = round  # the round whose closing last changed kept tensors
        self._replies: dict[ClientId, Reply] = {}
        self._invited: frozenset[ClientId] | None = None
        self.dropped: tuple[ClientId, ...] = ()
        spec = self.replica.spec
        size = self.uplink.code_numel(spec) if self.codes_cross else spec.numel
        self.momentum = torch.zeros(size)
        self.residual = torch.zeros(size)

    @property
    def round(self) -> int:
        """Number of closed rounds; the version of the global state."""
        return self.replica.version

    @property
    def replies(self) -> tuple[ClientId, ...]:
        """Who has replied in this round so far, in order of ids."""
        return tuple(sorted(self._replies, key=in_order))

    def client(self, number: ClientId, version: int = 0) -> Client:
        """A client of this federation in this process, at the state of round ``version``.

        It shares the server's initial tensors; what it would have received before is not counted.
        """
        from gradcodec.federated.client import Client

        client = Client(number, self.replica.first, self.uplink, self.downlink, self.config)
        replica = client.replica
        replica.share(self.replica)
        for blob in self.increments[:version]:
            replica.advance(blob)
        if version >= self.kept_since:
            replica.kept = self.replica.kept
        return client

    def invite(self, clients: Iterable[ClientId] | None) -> None:
        """Take replies of these clients only, in this round; ``None``: of anybody.

        Replies that came from others are dropped.

        Raises:
            ConfigError: an id that is none.
        """
        invited = None if clients is None else frozenset(client_id(c) for c in clients)
        self._invited = invited
        if invited is not None:
            self._replies = {c: r for c, r in self._replies.items() if c in invited}

    def broadcast(self, version: int = 0) -> bytes:
        """What a client at ``version`` needs to be at the current round, in the fewest bytes.

        Either the increments that it missed or one snapshot of the whole position; both are exact.

        Raises:
            ConfigError: this server has not been at ``version``.
        """
        self._check_version(version)
        parts = [*self._missed(version), *self._values(version)]
        return Broadcast(self.round, tuple(parts), self.replica.lineage).to_bytes()

    def _check_version(self, version: int) -> None:
        if not 0 <= version <= self.round:
            raise ConfigError(
                f"expected a version of 0..{self.round}, got {version}: this server has not been "
                f"there, or was restarted from an older checkpoint; {WAY_BACK}"
            )

    def _missed(self, version: int) -> list[Part]:
        """The increments after ``version``, or what is shorter."""
        if self.space.absolute:
            last = self.increments[-1:] if version < self.round else []
            return [(INCREMENT, b) for b in last]
        missed: list[Part] = [(INCREMENT, b) for b in self.increments[version:]]
        if len(missed) < 2:
            return missed
        whole: list[Part] = [(SNAPSHOT, self.replica.snapshot().to_bytes())]
        return min(missed, whole, key=part_nbytes)

    def _values(self, version: int) -> list[Part]:
        """Kept tensors, for a client at a version in which they had other values."""
        if version >= self.kept_since:
            return []
        return [(VALUES, self.replica.pack_kept(self.replica.kept).to_bytes())]

    @torch.no_grad()
    def receive(self, blob: bytes, *, sender: ClientId | None = None) -> Reply:
        """Take a reply of this round.

        Args:
            blob: what came.
            sender: who sent it, if the transport knows: a reply in another client's name is
                refused. Without it the id in the reply is taken at its word.

        Raises:
            UnexpectedReplyError: it is of another round, of a client that was not invited, in
                another client's name, a second one, or one too many.
            CodecMismatchError: it belongs to another codec, or was trained on another state.
            MalformedBodyError: the decoded values are not finite.
            WireError: the bytes are damaged.
        """
        reply = Reply.from_bytes(blob)
        self._check_expected(reply, sender)
        reply = self._rebased(reply)
        value = self._read(reply.payload)
        bad = int((~torch.isfinite(value)).sum())
        if bad:
            raise MalformedBodyError(f"client {reply.client!r}: {bad} values are NaN or Inf")
        if reply.values is not None:
            kept = self.replica.read_kept(reply.values)
            check_kept(kept, self.replica.kept, f"client {reply.client!r}")
        self._replies[reply.client] = reply
        return reply

    def _check_expected(self, reply: Reply, sender: ClientId | None) -> None:
        who = f"client {reply.client!r}"
        if sender is not None and client_id(sender) != reply.client:
            raise UnexpectedReplyError(f"{who}: a reply that {sender!r} sent in its name")
        if reply.round != self.round:
            raise UnexpectedReplyError(
                f"{who}: expected a reply to round {self.round}, got {reply.round}"
            )
        if self._invited is not None and reply.client not in self._invited:
            raise UnexpectedReplyError(f"{who} was not invited to round {self.round}")
        if reply.client in self._replies:
            raise UnexpectedReplyError(f"{who}: a second reply in one round")
        if len(self._replies) >= self.config.max_replies:
            raise UnexpectedReplyError(
                f"{who}: this round has {len(self._replies)} replies already, "
                "ServerConfig.max_replies of them"
            )

    def _rebased(self, reply: Reply) -> Reply:
        """The reply, bound to what the codec is bound to, if it is of this state."""
        expected = self.uplink.base if reply.version == 1 else self.replica.digest
        came = reply.payload.base
        if came != expected:
            raise CodecMismatchError(
                f"client {reply.client!r}: expected an update of the base "
                f"{expected.hex() if expected else None}, the state of round {self.round}, got "
                f"{came.hex() if came else None}: it has another history, or codecs for another "
                f"initial state; {WAY_BACK}"
            )
        return replace(reply, payload=replace(reply.payload, base=self.uplink.base))

    def _read(self, payload: Payload) -> Tensor:
        if self.codes_cross:
            return self.uplink.read_code(payload)
        return layout.flatten(self.uplink.decoder.decode(payload), self.replica.spec)

    def drop(self, client: ClientId) -> None:
        """Forget a client's reply of this round; it may reply again.

        Raises:
            ConfigError: it has not replied.
        """
        if client not in self._replies:
            raise ConfigError(f"expected a client that has replied, of {self.replies}: {client!r}")
        del self._replies[client]

    @torch.no_grad()
    def close_round(self) -> bytes:
        """Aggregate the replies into the next global state; returns the increment's bytes.

        Replies are added in the order of client ids, so arrival order does not matter. Where the
        next state would not be finite, the loudest replies are dropped, as few as make it so; a log
        line names them, and ``dropped`` holds them until the next round is closed.

        Raises:
            TrainingError: no reply was accepted, or the state would not be finite with any of them
                alone. The round stays open, and ``drop`` can take replies out.
        """
        if not self._replies:
            raise TrainingError(f"round {self.round}: expected at least one good reply, got none")
        step, dropped = self._finite_step()
        for client in dropped:
            logger.warning(
                "gradcodec: round %d: the reply of client %r was dropped, it would have made the "
                "state infinite",
                self.round,
                client,
            )
        self.momentum, self.residual = step.momentum, step.residual
        if step.replica.kept is not self.replica.kept:
            self.kept_since = step.replica.version
        self.replica = step.replica
        self.increments.append(step.increment)
        self._replies, self._invited, self.dropped = {}, None, dropped
        return step.increment

    def _finite_step(self) -> tuple[_Step, tuple[ClientId, ...]]:
        """The step with the fewest replies dropped that leads to a finite state; who they are."""
        try:
            return self._step(self._replies), ()
        except NonFiniteError as err:
            reason = err
        loudest = sorted(self._replies, key=self._loudness, reverse=True)
        found: tuple[_Step, tuple[ClientId, ...]] | None = None
        # Fewer are left the more are dropped: bisection finds the smallest number.
        low, high = 1, len(loudest) - 1
        while low <= high:
            count = (low + high) // 2
            gone = set(loudest[:count])
            try:
                step = self._step({c: r for c, r in self._replies.items() if c not in gone})
                found, high = (step, tuple(sorted(gone, key=in_order))), count - 1
            except NonFiniteError:
                low = count + 1
        if found is None:
            raise TrainingError(
                f"round {self.round}: the aggregated update diverged: {reason}"
            ) from reason
        return found

    def _loudness(self, client: ClientId) -> float:
        """The largest value that a reply brings, times its weight."""
        reply = self._replies[client]
        weight = 1 if self.config.aggregation == "sum" else reply.examples
        value = self._read(reply.payload)
        return weight * float(value.abs().amax()) if value.numel() else 0.0

    def _step(self, replies: Mapping[ClientId, Reply]) -> _Step:
        """What these replies lead to; ``NonFiniteError`` if any of it would not be finite."""
        ordered = [replies[c] for c in sorted(replies, key=in_order)]
        shares = mean_shares(len(ordered), [r.examples for r in ordered])
        kept = KeptMean(self.replica.kept)
        total = torch.zeros_like(self.momentum)
        for reply, share in zip(ordered, shares, strict=True):
            weight = 1.0 if self.config.aggregation == "sum" else share
            total.add_(self._read(reply.payload), alpha=weight)
            kept.add(None if reply.values is None else self.replica.read_kept(reply.values), share)
        momentum = self.config.momentum * self.momentum + total
        wanted = self.config.lr * momentum + self.residual
        layout.check_finite(wanted, "aggregate")
        payload, sent = self._encode(wanted)
        residual = self.residual
        if self.config.feedback and not self.space.absolute:
            residual = wanted - sent
        layout.check_finite(momentum, "momentum")
        layout.check_finite(residual, "feedback")
        blob = replace(payload, base=self.replica.lineage).to_bytes()
        replica = self.replica.copy()
        replica.advance(blob)
        replica.kept = kept.result() if kept.changed else replica.kept
        for name, t in replica.moved().items():
            layout.check_finite(t, name)
        return _Step(blob, momentum, residual, replica)

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
        out = {"momentum": self.momentum, "residual": self.residual, **self._kept_state()}
        for i, blob in enumerate(self.increments):
            out[f"increment.{i:06d}"] = as_tensor(blob)
        return out

    def _kept_state(self) -> dict[str, Tensor]:
        """The format of a state dict, since when kept tensors are what they are, and they."""
        out = {"format": torch.tensor([STATE_FORMAT, self.kept_since])}
        if self.replica.kept:
            out["kept"] = as_tensor(self.replica.pack_kept(self.replica.kept).to_bytes())
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
        increments = []
        for key in keys:
            blob = state[key].numpy().tobytes()
            increments.append(blob if "format" in state else replica.of_version_1(blob))
            replica.advance(increments[-1])
        since = self._load_kept(state, replica)
        self.momentum, self.residual = state["momentum"].clone(), state["residual"].clone()
        self.replica, self.increments, self.kept_since = replica, increments, since
        self._replies, self._invited, self.dropped = {}, None, ()

    @staticmethod
    def _load_kept(state: dict[str, Tensor], replica: Replica) -> int:
        """Put kept tensors into a replica that is at its round; since when they are these."""
        if "format" not in state:  # written before tensors were kept
            return 0
        number, since = (int(n) for n in state["format"].tolist())
        if number != STATE_FORMAT or not 0 <= since <= replica.version:
            raise ConfigError(
                f"server state: expected format {STATE_FORMAT} and a round of "
                f"0..{replica.version}, got {number} and {since}"
            )
        if replica.kept:
            if "kept" not in state:
                raise ConfigError("server state: the kept tensors are missing")
            payload = Payload.from_bytes(state["kept"].numpy().tobytes())
            replica.kept = replica.read_kept(payload)
        return since


def as_tensor(blob: bytes) -> Tensor:
    """Bytes as a tensor, uint8."""
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8)
