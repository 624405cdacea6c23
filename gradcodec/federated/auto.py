"""``subspace:auto``: a federation that needs no preparation.

It begins with a codec that needs no training. From the replies of its first rounds the server fits
a subspace, which it broadcasts once to each client as a part of the stream, and all train in it
from then on. A refresh goes back to the first codec for a round and fits again.

    round        0 .. warmup_rounds - 1    warmup_rounds ..    refresh   ..
    replies      first codec, post         codes, latent       post      codes, latent
    broadcasts   first codec               CODEC, codes        CODEC     CODEC, codes

At a switch the state of the round becomes the origin that codes are relative to; codecs are bound
to its digest, which proves that all replicas agree to the bit. Which codec a round has is known
from the stream alone; clients need to know the first one only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, RotatedSign, Subspace
from gradcodec.errors import ConfigError, TrainingError
from gradcodec.federated.client import Client
from gradcodec.federated.config import ServerConfig, space_of
from gradcodec.federated.envelope import (
    CODEC,
    INCREMENT,
    KINDS,
    SNAPSHOT,
    Broadcast,
    Part,
    part_nbytes,
)
from gradcodec.federated.participants import ClientId, in_order
from gradcodec.federated.replica import Replica
from gradcodec.federated.server import Server, as_tensor
from gradcodec.federated.switch import Switch
from gradcodec.federated.tensors import Split, State
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.registry import make_codec
from gradcodec.tgap import SignalMoments, fit_subspace
from gradcodec.transforms.subspace.allocate import allocate
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import Update
from gradcodec.wire import Payload

Parts = list[Part]

_LOUDEST = 1e15  # sums of squares beyond this may leave fp32; no fit looks at such a reply


@dataclass(frozen=True)
class AutoConfig:
    """Settings of ``subspace:auto``.

    Attributes:
        warmup_rounds: rounds with the first codec before the first fit.
        first: untrained codec of replies in those rounds, by the name that ``make_codec`` knows.
        first_down: untrained codec of their broadcasts; what it loses is fed back.
        subspace: ratio, allocation, sides and storage of the bases to fit.
        bits: bits of a code value in replies, 1 (``RotatedSign``), 2, 4 or 8.
        down_bits: bits of a code value in broadcasts.
        refresh_rounds: later rounds that go back to the first codec, after which the subspace is
            fitted again and sent again.
        decay: at each fit, how much the rounds count that an earlier fit has seen, 0..1.
        lr: server learning rate on the aggregated update.
        momentum: server momentum; carried over a switch as far as the new codec can express it.
    """

    warmup_rounds: int = 3
    first: str = "rotsign"
    first_down: str = "int2"
    subspace: SubspaceConfig = field(
        default=SubspaceConfig(allocation="tempered", basis_dtype="int8")
    )
    bits: int = 2
    down_bits: int = 4
    refresh_rounds: tuple[int, ...] = ()
    decay: float = 0.5
    lr: float = 1.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        for name in (self.first, self.first_down):
            make_codec(name)
        for bits in (self.bits, self.down_bits):
            BlockQuantConfig(bits)
        self.server("post")
        if not (isinstance(self.warmup_rounds, int) and self.warmup_rounds >= 1):
            raise ConfigError(f"auto: expected warmup_rounds >= 1, got {self.warmup_rounds!r}")
        if any(r < self.warmup_rounds for r in self.refresh_rounds):
            raise ConfigError(
                f"auto: expected refresh_rounds from {self.warmup_rounds} on, "
                f"got {self.refresh_rounds!r}"
            )
        if not 0 <= self.decay <= 1:
            raise ConfigError(f"auto: expected a decay of 0..1, got {self.decay!r}")

    def server(self, mode: str) -> ServerConfig:
        """Aggregation settings of the rounds of one mode."""
        return ServerConfig(mode=mode, lr=self.lr, momentum=self.momentum)

    def codecs(self, transform: Subspace | None = None) -> tuple[Codec, Codec]:
        """Uplink and downlink codec: the untrained ones, or those of a fitted subspace."""
        if transform is None:
            return make_codec(self.first), make_codec(self.first_down)
        # One bit: clients' rotated signs average out; a broadcast has feedback for its errors.
        up = RotatedSign() if self.bits == 1 else BlockQuant(BlockQuantConfig(self.bits))
        return Chain(transform, up), Chain(transform, BlockQuant(BlockQuantConfig(self.down_bits)))

    def untrained(self, round: int) -> bool:
        """Whether a round is one of the first codec, as far as the settings say."""
        return round < self.warmup_rounds or round in self.refresh_rounds


@dataclass
class _Phase:
    """A stretch of rounds with one codec.

    Attributes:
        first: its first round.
        switch: what led to it; ``None`` for the first phase.
        increments: bytes of its rounds so far.
        end: snapshot of the position it ended at, if that is shorter than its increments.
    """

    first: int
    switch: Switch | None
    increments: list[bytes]
    end: bytes = b""


class AutoServer(Server):
    """The server of a ``subspace:auto`` federation; see ``Server`` for the steps of a round.

    .. code-block:: python

        server = AutoServer(initial)
        client = AutoClient(7, initial)
        state = client.receive(server.broadcast(client.version))
        ...                               # client.config.mode: "post" or "latent" in this round
        server.receive(client.reply(trained, examples))
        server.close_round()              # fits and switches when the rounds for it are over

    ``uplink``, ``downlink``, ``config``, ``increments``, ``momentum`` and ``residual`` are those of
    the current codec. A fit needs replies that agree in some direction, hence a round of two or
    more; without one the switch waits, and every later round tries again (``fits`` stays 0).

    Args:
        initial: the state that every participant derives by itself.
        config: when to switch, and to what.

    Raises:
        ConfigError: the subspace's settings cannot be met by these tensors.
    """

    def __init__(self, initial: State, config: AutoConfig | None = None) -> None:
        self.auto = config or AutoConfig()
        uplink, downlink = self.auto.codecs()
        super().__init__(initial, uplink, downlink, self.auto.server("post"))
        self.initial, self._first = self.replica.initial, self.replica
        spec = self.replica.spec
        self._axes = {t.name: Axis.choose(t, self.auto.subspace) for t in spec if t.numel}
        # Now rather than after the first rounds: what fits depends on the shapes alone.
        allocate(spec, {n: torch.ones(a.size) for n, a in self._axes.items()}, self.auto.subspace)
        self._phases = [_Phase(0, None, self.increments)]
        self._rounds: list[tuple[int, list[bytes]]] = []  # fits before it, payloads of its replies

    @property
    def fits(self) -> int:
        """How often a subspace was fitted and sent."""
        return sum(p.switch is not None and p.switch.mode == "latent" for p in self._phases)

    def client(self, number: ClientId, version: int = 0) -> AutoClient:
        """A client of this federation in this process, at the state of round ``version``."""
        client = AutoClient(number, self._first.first, self.auto)
        client.replica.share(self._first)
        client.move(self._history(version), version, None)
        if version >= self.kept_since:
            client.replica.kept = self.replica.kept
        return client

    def close_round(self) -> bytes:
        """Aggregate; then, if the next round has another codec, switch to it.

        Returns:
            The increment's bytes, which are written in the codec of the closed round.

        Raises:
            TrainingError: no reply was accepted, or the state would not be finite.
        """
        post, replies = self.config.mode == "post", self._replies
        blob = super().close_round()
        # In the order of client ids, so that arrival order does not matter.
        heard = [
            replies[c].payload
            for c in sorted(replies, key=in_order)
            if post and c not in self.dropped and self._fits_squared(replies[c].payload)
        ]
        if len(heard) >= 2:
            self._rounds.append((self.fits, [payload.to_bytes() for payload in heard]))
        untrained = self.auto.untrained(self.round)
        if untrained and self.config.mode == "latent":
            self._enter(self._switch(None))
        elif not untrained and self.config.mode == "post":
            transform = self._fit()
            if transform is not None:
                self._enter(self._switch(transform))
                if all(r < self.round for r in self.auto.refresh_rounds):
                    self._rounds = []  # no later fit will want them
        return blob

    def broadcast(self, version: int = 0) -> bytes:
        """What a client at ``version`` needs to be at the current round, in the fewest bytes.

        For each codec that it has missed rounds of, the increments or a snapshot, and the next
        codec; or else the current codec with the state that it began at. All are exact.
        """
        self._check_version(version)
        parts: Parts = []
        here = max(i for i, p in enumerate(self._phases) if p.first <= version)
        for phase in self._phases[here:]:
            if phase.first > version:
                assert phase.switch is not None
                parts.append((CODEC, phase.switch.to_bytes()))
            parts += self._steps(phase, max(version, phase.first))
        parts += self._values(version)
        led = Broadcast(self.round, tuple(parts), self.replica.lineage).to_bytes()
        if len(self._phases) - here < 2 or len(led) <= self.replica.spec.nbytes:
            return led
        return min(led, self.broadcast_whole(), key=len)

    def broadcast_whole(self) -> bytes:
        """What brings any client to the current round: its codec, the state it began at, its steps.

        Also for a replica that was refused for another digest: decoding multiplies matrices, which
        machines may round differently, and what counts then is the server's state.
        """
        phase = self._phases[-1]
        if phase.switch is None:
            return self.broadcast(0)
        parts: Parts = [(CODEC, phase.switch.to_bytes(self.replica.coded))]
        parts += [*self._steps(phase, phase.first), *self._values(0)]
        return Broadcast(self.round, tuple(parts), self.replica.lineage).to_bytes()

    def _steps(self, phase: _Phase, version: int) -> Parts:
        """The fewest bytes from ``version`` to the end of a phase."""
        missed: Parts = [(INCREMENT, b) for b in phase.increments[version - phase.first :]]
        if len(missed) < 2:
            return missed
        end = self.replica.snapshot().to_bytes() if phase is self._phases[-1] else phase.end
        whole: Parts = [(SNAPSHOT, end)]
        return whole if end and part_nbytes(whole) < part_nbytes(missed) else missed

    def _history(self, version: int) -> Parts:
        """Every increment and codec up to a round."""
        parts: Parts = []
        for phase in self._phases:
            if phase.first > version:
                break
            if phase.switch is not None:
                parts.append((CODEC, phase.switch.to_bytes()))
            parts += [(INCREMENT, b) for b in phase.increments[: version - phase.first]]
        return parts

    def _switch(self, transform: Subspace | None) -> Switch:
        mode = "post" if transform is None else "latent"
        state = self.replica.moved()
        return Switch.to(*self.auto.codecs(transform), mode, self.round, state)

    @torch.no_grad()
    def _enter(self, switch: Switch) -> None:
        """Make the current state the origin of new codecs, read as every client reads them."""
        replica, before, phase = self.replica, self.uplink, self._phases[-1]
        codecs = switch.codecs(replica.moved())
        carried = [before.from_code(self.momentum), before.from_code(self.residual)]
        end = self.replica.snapshot().to_bytes()
        if part_nbytes([(SNAPSHOT, end)]) < part_nbytes([(INCREMENT, b) for b in phase.increments]):
            phase.end = end
        since, dropped = self.kept_since, self.dropped
        parts = Split(tuple(replica.initial), replica.moved(), replica.kept)
        self._begin(parts, *codecs, self.auto.server(switch.mode), switch.first)
        self.kept_since, self.dropped = since, dropped
        self.momentum, self.residual = (self.uplink.to_code(value) for value in carried)
        self._phases.append(_Phase(switch.first, switch, self.increments))

    def _fits_squared(self, payload: Payload) -> bool:
        """Whether sums of squares of a reply stay in fp32."""
        value = self._read(payload)
        return not value.numel() or float(value.abs().max()) < _LOUDEST

    @torch.no_grad()
    def _fit(self) -> Subspace | None:
        """The subspace of what was received with the first codec; ``None``: no signal in it yet."""
        spec, config = self.replica.spec, self.auto.subspace
        reader = make_codec(self.auto.first).bind(spec).decoder
        moments = SignalMoments(spec, config)
        for fits, replies in self._rounds:
            # Moments are quadratic: the root of the weight on the values.
            scale = math.sqrt(self.auto.decay ** (self.fits - fits))
            updates = [
                {n: t * scale for n, t in reader.decode(Payload.from_bytes(b)).items()}
                for b in replies
            ]
            moments.add_round(updates)
        try:
            return fit_subspace(moments, config)
        except TrainingError:
            return None

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, as plain tensors."""
        blobs: dict[str, bytes] = {}
        number = 0
        for phase in self._phases:
            if phase.switch is not None:
                blobs[f"codec.{phase.first:06d}"] = phase.switch.to_bytes()
            for blob in phase.increments:
                blobs[f"increment.{number:06d}"] = blob
                number += 1
        for at, (fits, replies) in enumerate(self._rounds):
            for i, blob in enumerate(replies):
                blobs[f"seen.{at:06d}.{fits:06d}.{i:06d}"] = blob
        out = {"momentum": self.momentum, "residual": self.residual, **self._kept_state()}
        for name, blob in blobs.items():
            out[name] = as_tensor(blob)
        return out

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of ``state_dict``: replays what was sent, which restores it to the bit.

        Raises:
            ConfigError, WireError: the state is another federation's; nothing is changed then.
        """
        made = AutoServer(self._first.first, self.auto)
        made.initial = self.initial
        try:
            blobs = {n: t.numpy().tobytes() for n, t in state.items() if "." in n}
            steps = sum(name.startswith("increment.") for name in blobs)
            for number in range(steps + 1):
                coded = blobs.pop(f"codec.{number:06d}", None)
                if coded is not None:
                    made._enter(Switch.from_bytes(coded))
                if number < steps:
                    blob = blobs.pop(f"increment.{number:06d}")
                    blob = blob if "format" in state else made.replica.of_version_1(blob)
                    made.replica.advance(blob)
                    made.increments.append(blob)
            last, reader = "", make_codec(self.auto.first).bind(made.replica.spec)
            for name in sorted(n for n in blobs if n.startswith("seen.")):
                _, at, fits, _ = name.split(".")
                if at != last:
                    made._rounds.append((int(fits), []))
                blob, last = blobs.pop(name), at
                reader._open(Payload.from_bytes(blob))
                made._rounds[-1][1].append(blob)
        except (KeyError, TypeError, ValueError) as err:  # WireError is one
            raise ConfigError(f"server state: not of this federation: {err!r}") from err
        if blobs:
            raise ConfigError(f"server state: not expected: {sorted(blobs)[:3]}")
        for name, mine in (("momentum", made.momentum), ("residual", made.residual)):
            came = state.get(name, torch.empty(0)).shape
            if came != mine.shape:
                raise ConfigError(
                    f"server state: expected {name} {list(mine.shape)}, got {list(came)}"
                )
        made.kept_since = self._load_kept(state, made.replica)
        made.momentum, made.residual = state["momentum"].clone(), state["residual"].clone()
        self.__dict__.update(made.__dict__)


class AutoClient(Client):
    """One participant of a ``subspace:auto`` federation; see ``Client`` for its use.

    ``config.mode`` says after each ``receive`` how this round is trained: ``"post"``, with any
    optimiser, or ``"latent"``, through a ``LatentOptimizer`` with ``codec``.

    Args:
        number: this client's id.
        initial: the state that every participant derives by itself.
        config: as the server's; only ``first`` and ``first_down`` matter here.
    """

    def __init__(self, number: ClientId, initial: State, config: AutoConfig | None = None) -> None:
        self.auto = config or AutoConfig()
        uplink, downlink = self.auto.codecs()
        super().__init__(number, initial, uplink, downlink, self.auto.server("post"))
        self._first = self.codec, self.config, self.replica.copy()

    def reset(self) -> None:
        """Go back to the initial state and the first codec; see ``Client.reset``."""
        self.codec, self.config, first = self._first
        self.replica = first.copy()

    def receive(self, blob: bytes) -> Update:
        """Move to the round of a broadcast, codecs included; returns the global state.

        Raises:
            WireError: the bytes are damaged or belong to other codecs or another state; the client
                is then as before.
        """
        message = Broadcast.from_bytes(blob, KINDS)
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
        """Follow the parts of a broadcast, codecs included; arguments as of ``Replica.apply``."""
        codec, config, replica = self.codec, self.config, self.replica.copy()
        switches = [Switch.from_bytes(part) for kind, part in parts if kind == CODEC]
        ends = [*(s.first for s in switches), until]
        whole = [i for i, switch in enumerate(switches) if switch.state]
        begin = whole[-1] + 1 if whole else 0  # a state makes what came before it needless
        for i, steps in enumerate(_split(parts)):
            if i < begin:
                continue
            if i:
                switch = switches[i - 1]
                state = switch.whole_state(replica.spec)
                state = replica.moved() if state is None else state
                codec, downlink = switch.codecs(state)
                config = self.auto.server(switch.mode)
                parts_of = Split(tuple(replica.initial), dict(state), replica.kept)
                replica = Replica(parts_of.whole, space_of(downlink, config), switch.first)
            last = i == len(switches)
            replica.apply(steps, ends[i], lineage if last else None, version_1)
        self.codec, self.config, self.replica = codec, config, replica


def server_for(
    codec: str | Codec, initial: Update, config: ServerConfig | AutoConfig | None = None
) -> Server:
    """A server by the name of its codec; ``server.client(number)`` makes clients that go with it.

    Args:
        codec: ``"subspace:auto"``, a name that ``make_codec`` knows, or a codec.
        initial: the state that every participant derives by itself.
        config: an ``AutoConfig`` for ``"subspace:auto"``, else a ``ServerConfig``.

    Raises:
        ConfigError: an unknown name, or the settings of the other kind.
    """
    automatic = codec == "subspace:auto"
    if isinstance(config, ServerConfig if automatic else AutoConfig):
        raise ConfigError(f"{codec!r} does not go with {type(config).__name__}")
    if automatic:
        return AutoServer(initial, config if isinstance(config, AutoConfig) else None)
    made = make_codec(codec) if isinstance(codec, str) else codec
    return Server(initial, made, config=config if isinstance(config, ServerConfig) else None)


def _split(parts: Sequence[Part]) -> list[Parts]:
    """The steps before, between and after the codecs of a broadcast."""
    out: list[Parts] = [[]]
    for kind, part in parts:
        if kind == CODEC:
            out.append([])
        else:
            out[-1].append((kind, part))
    return out
