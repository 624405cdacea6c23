"""The server's side of federated averaging with codes in both directions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.errors import ConfigError, TrainingError
from gradcodec.federated import restore
from gradcodec.federated.admission import admitted, values_of
from gradcodec.federated.aggregation import round_for
from gradcodec.federated.client import Client
from gradcodec.federated.config import ServerConfig, codecs_for, space_of
from gradcodec.federated.envelope import VALUES, Broadcast, Part, Reply
from gradcodec.federated.history import History
from gradcodec.federated.next_state import finite_step
from gradcodec.federated.participants import ClientId, client_id
from gradcodec.federated.replica import WAY_BACK, Replica
from gradcodec.federated.schedule import Fixed, Schedule, Stage
from gradcodec.federated.switch import Switch
from gradcodec.federated.tensors import Split, State, check_private, check_rules, split
from gradcodec.types import Update

logger = logging.getLogger("gradcodec.federated")


class Server:
    """Holds the global replica, collects replies, closes rounds.

    1. ``invite(clients)``       names who may reply; without it anybody may
    2. ``broadcast(version)`` -> bytes that bring a client from ``version`` to now
    3. ``receive(blob)``      <- bytes of a reply; a bad one raises and changes nothing
    4. ``close_round()``         aggregates, encodes the increment, applies what it decodes to

    A round takes the memory of a few states, however many clients reply: replies are added up as
    they arrive. The sums are exact, so the order of arrival does not matter. Only the loudest
    replies, which may have to be dropped, are held as bytes, up to ``config.hold_bytes``; a robust
    aggregation and a relay hold all of them.

    Args:
        initial: the initial state, which every participant builds locally: a module, or tensors by
            name.
        uplink: codec of replies, or its name; it is bound to the initial state here
            (``for_state``).
        downlink: codec of broadcasts, likewise; the uplink codec by default. Latent mode needs the
            same code space in both directions (another quantiser is fine). A relay
            (``config.relay``) has none.
        config: aggregation settings.

    Raises:
        ConfigError, UpdateError: a tensor cannot travel as the codecs and rules say; the message
            names it.
    """

    def __init__(
        self,
        initial: State,
        uplink: Codec | str,
        downlink: Codec | str | None = None,
        config: ServerConfig | None = None,
    ) -> None:
        self._start(initial, Fixed(uplink, downlink, config))

    def _start(self, initial: State, schedule: Schedule) -> None:
        """Begin round 0 of a schedule."""
        self.schedule = schedule
        rules = schedule.first.config.rules
        parts = split(initial, rules)
        check_rules(rules, parts.names)
        check_private(schedule.first.config.privacy is not None, parts.kept)
        self.history = History()
        self.kept_since = 0  # the version from which kept tensors have been the same
        self.dropped: tuple[ClientId, ...] = ()
        stage = schedule.first
        self._use(stage.config, *codecs_for(parts.coded, *_both(stage), stage.config), parts, 0)
        self._first = self.replica
        schedule.check(self.replica.spec)

    def _use(
        self, config: ServerConfig, uplink: Codec, downlink: Codec, parts: Split, round: int
    ) -> None:
        """Use these bound codecs from now on, relative to the state of ``round``."""
        self.config, self.uplink, self.downlink = config, uplink, downlink
        latent = config.mode == "latent"
        self.space = space_of(uplink, downlink, config)
        same = uplink.code_space == downlink.code_space
        if latent and not same:
            raise ConfigError(f"latent mode: {uplink} and {downlink} differ in code space")
        # Codes are averaged as codes if they add and share a code space, else decoded values are.
        self.codes_cross = latent or (same and self.space.in_code)
        self.replica = Replica(parts.whole, self.space, round)
        spec = self.replica.spec
        size = uplink.code_numel(spec) if self.codes_cross else spec.numel
        self.momentum = torch.zeros(size)
        self.residual = torch.zeros(size)
        self._open_round()

    def _open_round(self) -> None:
        self._invited: frozenset[ClientId] | None = None
        size, read = len(self.momentum), partial(values_of, self)
        self._replies = round_for(self.config, size, self.replica.kept, read)

    @property
    def round(self) -> int:
        """Number of closed rounds; the version of the global state."""
        return self.replica.version

    @property
    def replies(self) -> tuple[ClientId, ...]:
        """Who has replied in this round so far, in order of ids."""
        return self._replies.clients

    @property
    def increments(self) -> list[bytes]:
        """What was broadcast in the rounds of the current codec."""
        return self.history.current.increments

    @property
    def initial(self) -> Update:
        """The state that round 0 began with."""
        return self._first.initial

    def client(self, number: ClientId, version: int = 0) -> Client:
        """A client of this federation in this process, at the state of round ``version``.

        It shares the server's initial tensors; the bytes that led to ``version`` are not counted.
        """
        client = self._new_client(number)
        if version == self.round and self.history.current.switch is None:
            client.replica = self.replica.copy()  # without decoding what led there
            return client
        client.replica.share(self._first)
        client.move(self.history.until(version), version, None)
        if version >= self.kept_since:
            client.replica.kept = self.replica.kept
        return client

    def _new_client(self, number: ClientId) -> Client:
        stage = self.schedule.first
        return Client(number, self._first.first, *_both(stage), stage.config)

    def invite(self, clients: Iterable[ClientId] | None) -> None:
        """Accept replies of these clients only, in this round; ``None`` accepts anybody.

        Call it before the first reply.

        Raises:
            ConfigError: an id is invalid, or a client that is not invited has already replied.
        """
        invited = None if clients is None else frozenset(client_id(c) for c in clients)
        strangers = [c for c in self.replies if invited is not None and c not in invited]
        if strangers:
            raise ConfigError(
                f"{strangers[0]!r} has replied and is not invited: invite clients before they "
                "reply, or abandon_round() first"
            )
        self._invited = invited

    def broadcast(self, version: int = 0) -> bytes:
        """The fewest bytes that bring a client from ``version`` to the current round.

        They hold the missed increments or one snapshot of the whole position; both are exact. If
        the codec has changed since, they hold this for each codec of the missed rounds, and these
        codecs; or, if that is shorter, the current codec and the state that it began at.

        Raises:
            ConfigError: this server has not been at ``version``.
        """
        if not 0 <= version <= self.round:
            raise ConfigError(
                f"expected a version of 0..{self.round}, got {version}: this server has not been "
                f"there, or was restarted from an older checkpoint; {WAY_BACK}"
            )
        steps = self.history.since(version, self.replica)
        led = self._message([*steps, *self._kept_values(version)])
        if self.history.spans(version) < 2 or len(led) <= self.replica.spec.nbytes:
            return led
        return min(led, self.broadcast_whole(), key=len)

    def broadcast_whole(self) -> bytes:
        """Bytes for a client at any round: the current codec, the state it began at, the steps.

        Also helps a replica that was refused because its digest differs: machines may round the
        matrix products of decoding differently, and the server's state is the one that counts.
        """
        if self.history.current.switch is None:
            return self.broadcast(0)
        steps = self.history.anew(self.replica)
        return self._message([*steps, *self._kept_values(0)])

    def _message(self, parts: list[Part]) -> bytes:
        return Broadcast(self.round, tuple(parts), self.replica.lineage).to_bytes()

    def _kept_values(self, version: int) -> list[Part]:
        """The kept tensors, if they have changed since ``version``."""
        if version >= self.kept_since:
            return []
        return [(VALUES, self.replica.pack_kept(self.replica.kept).to_bytes())]

    @torch.no_grad()
    def receive(self, blob: bytes, *, sender: ClientId | None = None) -> Reply:
        """Accept a reply of this round.

        Args:
            blob: what came.
            sender: who sent it, if the transport knows: a reply in another client's name is
                refused. Without it the id in the reply is trusted.

        Raises:
            UnexpectedReplyError: the reply is for another round, from a client that was not
                invited, in another client's name, a client's second one, or more than
                ``max_replies``.
            CodecMismatchError: it belongs to another codec, or was trained on another state.
            MalformedBodyError: the decoded values are not finite.
            WireError: the bytes are damaged.
        """
        reply, values = admitted(self, blob, sender)
        self._replies.add(reply, len(blob), values)
        self.schedule.hear(reply, values[0])
        return reply

    def drop(self, client: ClientId) -> None:
        """Forget a client's reply of this round; it may reply again.

        Raises:
            ConfigError: it has not replied, or its reply is in the running sum already.
        """
        self._replies.drop(client)

    def abandon_round(self) -> None:
        """Forget all replies and the invitation; the round begins anew from the same state."""
        self._open_round()

    @torch.no_grad()
    def close_round(self) -> bytes:
        """Aggregate the replies into the next global state; returns the increment's bytes.

        If the next state would not be finite, the loudest replies are dropped, as few as needed; a
        log line names their clients, and ``dropped`` lists them until the next round is closed.
        After that the schedule may switch codecs; the increment is still in the round's own codec.

        Raises:
            TrainingError: no reply was accepted, or fewer than ``privacy.shares``, or the state
                would not be finite with any number of held replies dropped. The round stays open:
                ``drop`` removes one reply, ``abandon_round`` all of them.
        """
        if not len(self._replies):
            raise TrainingError(f"round {self.round}: expected at least one good reply, got none")
        step, dropped = finite_step(self)
        self._check_noise(len(self._replies) - len(dropped))
        for client in dropped:
            logger.warning(
                "gradcodec: round %d: the reply of client %r was dropped, it would have made the "
                "state infinite",
                self.round,
                client,
            )
        counted = {*self.replies}.difference(dropped)
        self.momentum, self.residual, self.dropped = step.momentum, step.residual, dropped
        if step.replica.kept is not self.replica.kept:
            self.kept_since = step.replica.version
        self.replica = step.replica
        self.history.add(step.increment)
        stage = self.schedule.next(self.round, self.replica.spec, self.config.mode, counted)
        if stage is None:
            self._open_round()
        else:
            state = self.replica.moved()
            self._enter(Switch.to(*_both(stage), stage.config.mode, self.round, state))
        return step.increment

    def _check_noise(self, count: int) -> None:
        """Raise ``TrainingError`` if the noise of so few replies falls short of the guarantee."""
        privacy = self.config.privacy
        if privacy is not None and count < privacy.shares:
            raise TrainingError(
                f"round {self.round}: each reply holds one of {privacy.shares} shares of the "
                f"noise, and {count} replies are too few for the guarantee"
            )

    @torch.no_grad()
    def _enter(self, switch: Switch) -> None:
        """Switch to new codecs, built as clients build them, with the current state as origin."""
        replica, before = self.replica, self.uplink
        codecs = switch.codecs(replica.moved())
        carried = [before.from_code(self.momentum), before.from_code(self.residual)]
        self.history.enter(switch, self.replica.snapshot().to_bytes())
        parts = Split(tuple(replica.initial), replica.moved(), replica.kept)
        self._use(self.schedule.config(switch.mode), *codecs, parts, switch.first)
        self.momentum, self.residual = (self.uplink.to_code(value) for value in carried)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as plain tensors."""
        return restore.state_of(self)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of ``state_dict``: replays what was sent, which restores the server to the bit.

        Raises:
            ConfigError, WireError: the state is another federation's; nothing changes then.
        """
        made = type(self).__new__(type(self))
        made._start(self._first.first, self.schedule)
        restore.replay(made, state)
        for name in restore.RESTORED:
            setattr(self, name, getattr(made, name))
        self._open_round()


def _both(stage: Stage) -> tuple[Codec, Codec]:
    return stage.uplink, stage.downlink
