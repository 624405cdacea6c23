"""Which codecs each round uses: always the same, or a subspace fitted during training."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codec.pins import table_of
from gradcodec.codecs import BlockQuant, RotatedSign, Subspace
from gradcodec.encodable import shown
from gradcodec.errors import ConfigError, TrainingError
from gradcodec.federated.config import ServerConfig
from gradcodec.federated.envelope import Reply
from gradcodec.federated.history import as_bytes, as_tensor
from gradcodec.federated.participants import ClientId, in_order
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.registry import make_codec
from gradcodec.tgap import SignalMoments, fit_subspace
from gradcodec.transforms.subspace.allocate import allocate
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import UpdateSpec
from gradcodec.wire import Payload

_DECAY = 0.5
_LOUDEST = 1e15  # sums of squares of larger values may leave fp32; fits skip such replies


@dataclass(frozen=True)
class Stage:
    """What a stretch of rounds uses.

    Attributes:
        uplink: codec of replies, not bound yet.
        downlink: codec of broadcasts.
        config: aggregation settings.
    """

    uplink: Codec
    downlink: Codec
    config: ServerConfig


class Schedule(Protocol):
    """Decides which codecs each round uses, from what the server has received."""

    @property
    def first(self) -> Stage:
        """The stage of round 0, which every client knows."""

    def config(self, mode: str) -> ServerConfig:
        """Aggregation settings of later rounds of this mode; clients must know them as well."""

    def check(self, spec: UpdateSpec) -> None:
        """Raise ``ConfigError`` if no later stage can fit these tensors."""

    def hear(self, reply: Reply, value: Tensor) -> None:
        """Called for each accepted reply of a round; ``value`` is what it decodes to."""

    def next(
        self, round: int, spec: UpdateSpec, mode: str, counted: Container[ClientId]
    ) -> Stage | None:
        """The stage from ``round`` on; ``None`` to stay in the current one.

        Args:
            round: the round that begins.
            spec: the coded tensors.
            mode: mode of the round that was closed.
            counted: clients whose replies counted in that round.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """What the schedule needs after a restart."""

    def load_state_dict(self, state: Mapping[str, Tensor], spec: UpdateSpec, fits: int) -> None:
        """Inverse of ``state_dict``; ``ConfigError`` if it is another federation's."""


def _codec(codec: object) -> Codec:
    if isinstance(codec, str):
        return make_codec(codec)
    if not isinstance(codec, Codec):
        raise ConfigError(f"expected a codec or its name, such as 'int4', got {shown(codec)}")
    return codec


class Fixed:
    """The same stage for all rounds.

    Raises:
        ConfigError: an argument is of another kind, or there is no codec of this name.
    """

    def __init__(
        self, uplink: Codec | str, downlink: Codec | str | None, config: ServerConfig | None
    ) -> None:
        config = ServerConfig() if config is None else config
        if not isinstance(config, ServerConfig):
            raise ConfigError(f"expected a ServerConfig, got {shown(config)}")
        up = _codec(uplink)
        down = up if downlink is None else _codec(downlink)
        if config.relay and down.digest != up.digest:
            raise ConfigError(
                f"a relay sends replies on as they came: expected no downlink beside {up}, got "
                f"{shown(str(downlink))}"
            )
        self.first = Stage(up, down, config)

    def config(self, mode: str) -> ServerConfig:
        """There is no later stage."""
        return self.first.config

    def check(self, spec: UpdateSpec) -> None:
        """There is no later stage."""

    def hear(self, reply: Reply, value: Tensor) -> None:
        """Replies change nothing."""

    def next(
        self, round: int, spec: UpdateSpec, mode: str, counted: Container[ClientId]
    ) -> Stage | None:
        """Never another one."""
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], spec: UpdateSpec, fits: int) -> None:
        """Nothing."""


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
        decay: only with ``refresh_rounds``: factor of a round's weight for each earlier fit that
            has seen it, 0..1. ``None``: 0.5.
        lr: server learning rate on the aggregated update.
        momentum: server momentum; carried over a switch as far as the new codec can express it.
        fit_replies: most replies per round that a fit uses, those with the lowest ids; they are
            kept as bytes until the last fit.
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
    decay: float | None = None
    lr: float = 1.0
    momentum: float = 0.0
    fit_replies: int = 256

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
        if self.decay is not None and not 0 <= self.decay <= 1:
            raise ConfigError(f"auto: expected a decay of 0..1, got {self.decay!r}")
        if self.decay is not None and not self.refresh_rounds:
            raise ConfigError(f"auto: decay={self.decay} is of later fits: expected refresh_rounds")
        if type(self.fit_replies) is not int or self.fit_replies < 2:
            raise ConfigError(f"auto: expected fit_replies of at least 2, got {self.fit_replies!r}")

    def server(self, mode: str) -> ServerConfig:
        """Aggregation settings of the rounds of one mode."""
        return ServerConfig(mode=mode, lr=self.lr, momentum=self.momentum)

    def codecs(self, transform: Subspace | None = None) -> tuple[Codec, Codec]:
        """Uplink and downlink codec: the untrained ones, or those of a fitted subspace."""
        if transform is None:
            return make_codec(self.first), make_codec(self.first_down)
        # One bit: errors of rotated signs average out over clients; broadcasts have feedback.
        up = RotatedSign() if self.bits == 1 else BlockQuant(BlockQuantConfig(self.bits))
        return Chain(transform, up), Chain(transform, BlockQuant(BlockQuantConfig(self.down_bits)))

    def untrained(self, round: int) -> bool:
        """Whether the settings ask for the first codec in a round."""
        return round < self.warmup_rounds or round in self.refresh_rounds


class FitSubspace:
    """``subspace:auto``: an untrained codec first, then a subspace fitted on what was received.

    A fit needs a round of two or more replies that agree in some direction. Until there is one, the
    switch waits, and every later round tries again.
    """

    def __init__(self, auto: AutoConfig) -> None:
        self.auto = auto
        self.first = Stage(*auto.codecs(), auto.server("post"))
        self._heard: dict[ClientId, Reply] = {}
        self._rounds: list[tuple[int, list[bytes]]] = []  # (fits before it, payloads)
        self._fits = 0

    def config(self, mode: str) -> ServerConfig:
        """The aggregation settings of ``auto``."""
        return self.auto.server(mode)

    def check(self, spec: UpdateSpec) -> None:
        """What can be fitted depends on shapes alone, so it is known before the first round."""
        axes = {t.name: Axis.choose(t, self.auto.subspace) for t in spec if t.numel}
        allocate(spec, {n: torch.ones(a.size) for n, a in axes.items()}, self.auto.subspace)

    def hear(self, reply: Reply, value: Tensor) -> None:
        """Keep the reply for the fit, if its id is among the lowest and it is not too loud."""
        if value.numel() and float(value.abs().max()) >= _LOUDEST:
            return
        self._heard[reply.client] = reply
        if len(self._heard) > 2 * self.auto.fit_replies:
            self._heard = {r.client: r for r in self._lowest()}

    def _lowest(self) -> list[Reply]:
        found = sorted(self._heard.values(), key=lambda r: in_order(r.client))
        return found[: self.auto.fit_replies]

    def next(
        self, round: int, spec: UpdateSpec, mode: str, counted: Container[ClientId]
    ) -> Stage | None:
        """Go to the first codec for a refresh, and to a subspace as soon as one can be fitted."""
        heard = [r for r in self._lowest() if r.client in counted]
        self._heard = {}
        if mode == "post" and len(heard) >= 2:
            self._rounds.append((self._fits, [r.payload.to_bytes() for r in heard]))
        untrained = self.auto.untrained(round)
        if untrained and mode == "latent":
            return self.first
        if untrained or mode == "latent":
            return None
        transform = self._fit(spec)
        if transform is None:
            return None
        self._fits += 1
        if all(r < round for r in self.auto.refresh_rounds):
            self._rounds = []  # no later fit will want them
        return Stage(*self.auto.codecs(transform), self.config("latent"))

    @torch.no_grad()
    def _fit(self, spec: UpdateSpec) -> Subspace | None:
        """Fit a subspace on the replies in the first codec; ``None`` if they hold no signal yet."""
        reader = make_codec(self.auto.first).bind(spec).decoder
        moments = SignalMoments(spec, self.auto.subspace)
        decay = _DECAY if self.auto.decay is None else self.auto.decay
        for fits, replies in self._rounds:
            # Moments are quadratic, so values get the root of the weight.
            scale = math.sqrt(decay ** (self._fits - fits))
            updates = [
                {n: t * scale for n, t in reader.decode(Payload.from_bytes(b)).items()}
                for b in replies
            ]
            moments.add_round(updates)
        try:
            return fit_subspace(moments, self.auto.subspace)
        except TrainingError:
            return None

    def state_dict(self) -> dict[str, Tensor]:
        """The replies that later fits will use, as bytes."""
        return {
            f"seen.{at:06d}.{fits:06d}.{i:06d}": as_tensor(blob)
            for at, (fits, replies) in enumerate(self._rounds)
            for i, blob in enumerate(replies)
        }

    def load_state_dict(self, state: Mapping[str, Tensor], spec: UpdateSpec, fits: int) -> None:
        """Inverse of ``state_dict``, after ``fits`` fits."""
        rounds: list[tuple[int, list[bytes]]] = []
        last, reader = "", make_codec(self.auto.first).bind(spec)
        try:
            for name in sorted(n for n in state if n.startswith("seen.")):
                _, at, before, _ = name.split(".")
                if at != last:
                    rounds.append((int(before), []))
                blob, last = as_bytes(name, state[name]), at
                table_of(reader, Payload.from_bytes(blob))
                rounds[-1][1].append(blob)
        except ValueError as err:  # WireError is one
            raise ConfigError(f"server state: not of this federation: {err!r}") from err
        self._rounds, self._fits, self._heard = rounds, fits, {}
