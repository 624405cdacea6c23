"""The client's side: receive the global state, train however you like, reply in few bytes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.codec import Codec
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.faf import LatentOptimizer
from gradcodec.federated.config import ServerConfig, codecs_for, space_of
from gradcodec.federated.envelope import (
    CODEC,
    FIXED,
    SNAPSHOT,
    VALUES,
    Broadcast,
    Part,
    Reply,
)
from gradcodec.federated.participants import ClientId, client_id, example_count
from gradcodec.federated.replica import Replica
from gradcodec.federated.schedule import Fixed, Schedule
from gradcodec.federated.switch import Switch
from gradcodec.federated.tensors import (
    Split,
    State,
    check_kept,
    check_private,
    check_rules,
    split,
    tensors_of,
)
from gradcodec.parameters import plain_names, unwrap_optimizer
from gradcodec.representation import represent
from gradcodec.types import Update, UpdateSpec
from gradcodec.wire import Payload


class Client:
    """One participant; given the server's arguments, it makes the same codecs.

        client = Client(7, initial, uplink, downlink, config)
        state = client.receive(server.broadcast(client.version))     # bytes -> named tensors
        ...                                                          # load them, train, any loop
        blob = client.reply(model, examples=len(data))               # what to send back

    In latent mode make a ``LatentOptimizer(model, client.codec, ...)`` for the round and reply with
    it instead of with the model.

    Args:
        number: this client's id: a number of 0..2^64 - 1, or a name.
        initial: the initial state, which every participant builds locally: a module, or tensors by
            name.
        uplink, downlink, config: as the server's.

    Raises:
        ConfigError, UpdateError: the id is invalid, or a tensor cannot travel as the codecs and
            rules say.
    """

    def __init__(
        self,
        number: ClientId,
        initial: State,
        uplink: Codec | str,
        downlink: Codec | str | None = None,
        config: ServerConfig | None = None,
    ) -> None:
        self._start(number, initial, Fixed(uplink, downlink, config), FIXED)

    def _start(
        self, number: ClientId, initial: State, schedule: Schedule, kinds: tuple[int, ...]
    ) -> None:
        """Begin at round 0 of a schedule; ``kinds``: the parts that broadcasts may contain."""
        self.number = client_id(number)
        self._schedule, self._kinds = schedule, kinds
        stage = schedule.first
        self.config = stage.config
        parts = split(initial, self.config.rules)
        check_rules(self.config.rules, parts.names)
        check_private(self.config.privacy is not None, parts.kept)
        self.codec, broadcasts = codecs_for(parts.coded, stage.uplink, stage.downlink, self.config)
        self.replica = Replica(parts.whole, space_of(self.codec, broadcasts, self.config))
        self._switch: Switch | None = None
        self._first = self.codec, self.config, self.replica.copy()

    @property
    def version(self) -> int:
        """The round whose global state this client holds."""
        return self.replica.version

    def receive(self, blob: bytes) -> Update:
        """Move to the round of a broadcast; returns the global state.

        Raises:
            CodecMismatchError: it belongs to another history than this client's; see ``reset``.
            WireError: the bytes are damaged or of other codecs. On any error nothing changes.
        """
        message = Broadcast.from_bytes(blob, self._kinds)
        self.replica.check_order(message)
        self.move(message.parts, message.round, message.lineage, message.lineage is None)
        return self.replica.state()

    def move(
        self,
        parts: Sequence[Part],
        until: int,
        lineage: bytes | None,
        version_1: bool = False,
    ) -> None:
        """Apply the parts of a broadcast, codecs included; arguments as in ``Replica.apply``."""
        codec, config, replica = self.codec, self.config, self.replica.copy()
        switch = self._switch
        switches = [Switch.from_bytes(part) for kind, part in parts if kind == CODEC]
        ends = [*(s.first for s in switches), until]
        whole = [i for i, switch in enumerate(switches) if switch.state]
        begin = whole[-1] + 1 if whole else 0  # a whole state replaces what came before it
        for i, steps in enumerate(_split(parts)):
            if i < begin:
                continue
            if i:
                switch = switches[i - 1]
                state = switch.whole_state(replica.spec)
                state = replica.moved() if state is None else state
                codec, downlink = switch.codecs(state)
                config = self._schedule.config(switch.mode)
                now = Split(tuple(replica.initial), dict(state), replica.kept)
                replica = Replica(now.whole, space_of(codec, downlink, config), switch.first)
            last = i == len(switches)
            replica.apply(steps, ends[i], lineage if last else None, version_1)
        self.codec, self.config, self.replica, self._switch = codec, config, replica, switch

    def snapshot(self) -> bytes:
        """A broadcast that brings a new client to this one's state, to the bit.

        A node whose process ends after each round keeps it, and receives it in the next:

            saved = client.snapshot()
            client = Client(7, initial, uplink, downlink, config)
            client.receive(saved)
        """
        at, parts, begun = self.replica, [], 0
        if self._switch is not None:
            parts.append((CODEC, self._switch.to_bytes(at.coded)))
            begun = self._switch.first
        if at.version > begun:
            parts.append((SNAPSHOT, at.snapshot().to_bytes()))
        if at.kept:
            parts.append((VALUES, at.pack_kept(at.kept).to_bytes()))
        return Broadcast(at.version, tuple(parts), at.lineage).to_bytes()

    def reset(self) -> None:
        """Go back to the initial state (version 0), where ``server.broadcast(0)`` applies.

        Needed when the server or this client has lost rounds.
        """
        self.codec, self.config, first = self._first
        self.replica, self._switch = first.copy(), None

    def reply(
        self, trained: State | LatentOptimizer, examples: int, *, buffers: State | None = None
    ) -> bytes:
        """The bytes of this round's reply.

        Args:
            trained: the module or its tensors after local training, or the latent optimiser that
                trained them.
            examples: how many examples the training used; the weight of this reply.
            buffers: the module, or its tensors, to take the tensors from that travel bit for bit
                (``split``); those of ``trained`` by default. Needed with an optimiser, which has
                none, if such tensors exist.

        Raises:
            EmptyClientError: no examples.
            NonFiniteError: training diverged to NaN or Inf.
            UpdateError: names, shapes or dtypes differ from the global state's.
            ConfigError: the optimiser belongs to another codec or round, ``buffers`` is needed and
                missing, or ``examples`` is not a whole number.
        """
        count = example_count(examples, f"client {self.number!r}")
        privacy = self.config.privacy
        trained = unwrap_optimizer(trained)
        if isinstance(trained, LatentOptimizer):
            if buffers is None and self.replica.kept:
                raise ConfigError(
                    f"{next(iter(self.replica.kept))!r} travels bit for bit: reply(optimizer, "
                    "examples, buffers=model)"
                )
            payload = self._trained_code(trained)
            values = self._kept_values({} if buffers is None else tensors_of(buffers))
        else:
            tensors = self._checked(trained)
            coded = {n: tensors[n].detach().cpu() for n in self.replica.coded}
            update = represent(self.config.representation, coded, self.replica.moved())
            for name, t in update.items():
                layout.check_finite(t, f"client {self.number!r}, {name}")
            if privacy is None:
                payload = self.codec.encoder.encode(update, seed=self._seed)
            else:
                payload = privacy.encode(self.codec, update, seed=self._seed)
            values = self._kept_values(tensors if buffers is None else tensors_of(buffers))
        payload = replace(payload, base=self.replica.digest)
        count = count if privacy is None else 1  # how many there are is private as well
        return Reply(self.number, self.version, count, payload, values).to_bytes()

    def _trained_code(self, optimizer: LatentOptimizer) -> Payload:
        """The code that an optimiser of this round has trained."""
        codec = optimizer.codec
        if (codec.digest, codec.base) != (self.codec.digest, self.codec.base):
            raise ConfigError(
                f"client {self.number!r}: expected an optimiser of this client's codec, "
                f"LatentOptimizer(model, client.codec, ...), got one of {codec}"
            )
        if not optimizer.anchored_at(self.replica.moved()):
            raise ConfigError(
                f"client {self.number!r}: what this optimiser has trained does not start at the "
                f"state of round {self.version}, or somebody else has written into its parameters "
                "since: load what receive() returned, then call optimizer.rebase() or make a new "
                "LatentOptimizer, and train"
            )
        if self.config.privacy is not None:
            return self.config.privacy.write_code(codec, optimizer.code, seed=self._seed)
        return optimizer.payload(seed=self._seed)

    def _checked(self, trained: State) -> Update:
        """The tensors of a trained state; ``UpdateError`` unless they match the global ones."""
        if isinstance(trained, torch.optim.Optimizer):
            raise UpdateError(
                f"expected the trained module, its tensors or a LatentOptimizer, got "
                f"{type(trained).__name__}"
            )
        tensors = plain_names(dict(tensors_of(trained)), self.replica.initial)
        UpdateSpec.of(self.replica.initial).check(tensors)
        return tensors

    def _kept_values(self, tensors: Update) -> Payload | None:
        """The tensors that travel bit for bit, if any of them has changed."""
        before = self.replica.kept
        if not before:
            return None
        now = {n: tensors[n].detach().cpu() for n in before if n in tensors}
        UpdateSpec.of(before).check(now)
        if all(_same_bits(now[n], t) for n, t in before.items()):
            return None
        check_kept(now, before, f"client {self.number!r}")
        return self.replica.pack_kept(now)

    @property
    def _seed(self) -> int:
        """Seed of a stochastic codec; clients' seeds differ, so that their errors average out."""
        who = self.number
        name = who.encode() if isinstance(who, str) else struct.pack("<Q", who)
        return zlib.crc32(name + struct.pack("<Q", self.version))


def _split(parts: Sequence[Part]) -> list[list[Part]]:
    """The steps before, between and after the codecs of a broadcast."""
    out: list[list[Part]] = [[]]
    for kind, part in parts:
        if kind == CODEC:
            out.append([])
        else:
            out[-1].append((kind, part))
    return out


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)
