"""Federations that send updates below one bit a value, and two ways down that are as small.

    relay   replies go down as they came; clients average them as the server does. Whole updates in
            a codec are relayed by the library (``ServerConfig(relay=True)``), other codes here
    own     each client gets the difference to what it holds, coded for it alone

A relay loses nothing more than the replies did, at four replies for each round that a client
missed. A difference of its own costs the same after any number of rounds, and its error stays with
that client: the server's vector is exact, and the next difference makes up for it. The server then
keeps what each client holds.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.federated import fitted
from benchmarks.federated.methods import Coded, State
from benchmarks.federated.scheme import Make
from benchmarks.federated.world import World
from benchmarks.llama.codes import BLOCK, Bands, Code, Factors, Signs, contraction
from benchmarks.peers.federated.base import Peer, flat
from benchmarks.peers.federated.downlink import States
from benchmarks.peers.federated.envelope import Broadcast, Reply
from benchmarks.peers.federated.ffa import FROZEN
from gradcodec.codecs import RotatedSign, Subspace
from gradcodec.errors import CodecMismatchError, MalformedBodyError
from gradcodec.federated import ServerConfig
from gradcodec.packers.rotsign import RotatedSignConfig, RotatedSignPacker
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import UpdateSpec

_EXAMPLES = struct.Struct("<Q")  # before each reply in a broadcast: its weight


class Relayed(States):
    """Every round's replies, as they came; a client averages those of the rounds that it missed.

    A client that missed so many that the exact vector is smaller gets that.

    Args:
        start: the initial vector ``[n]``.
        step_of: the server's step ``[n]`` from the bytes of a round's replies.
    """

    def __init__(self, start: Tensor, step_of: Callable[[bytes], Tensor]) -> None:
        super().__init__(start)
        self.step_of = step_of
        self.rounds: list[bytes] = []

    def broadcast(self, version: int) -> bytes:
        """The replies of all rounds since ``version``, or the vector."""
        missed = Broadcast(self.version, tuple(self.rounds[version:])).to_bytes()
        return min(missed, super().broadcast(version), key=len)

    def arrive(self, held: Tensor, version: int, blob: bytes) -> tuple[int, Tensor]:
        """Add the steps that the server took, from bytes alone."""
        message = Broadcast.from_bytes(blob)
        if message.whole or not message.parts:
            return super().arrive(held, version, blob)
        if version + len(message.parts) != message.round:
            raise CodecMismatchError(
                f"expected the rounds from {version} to {message.round}, got {len(message.parts)}"
            )
        for part in message.parts:
            held = held + self.step_of(part)
        return message.round, held


class Own(States):
    """Each client gets the coded difference to what it holds.

    Args:
        start: the initial vector ``[n]``.
        code: of differences.
    """

    def __init__(self, start: Tensor, code: Code) -> None:
        super().__init__(start)
        self.code = code
        self._theirs: dict[int, Tensor] = {}
        self._sent = 0

    def broadcast_to(self, client: int, version: int) -> bytes:
        """The difference, once anything has changed since ``version``; remembers what arrives."""
        if version == self.version:
            return Broadcast(self.version).to_bytes()
        theirs = self._theirs.get(client, self.start)
        body = self.code.encode(self.vector - theirs, self._sent)
        self._sent += 1
        self._theirs[client] = theirs + self.code.decode(body)
        return Broadcast(self.version, (body,)).to_bytes()

    def arrive(self, held: Tensor, version: int, blob: bytes) -> tuple[int, Tensor]:
        """Add the difference."""
        message = Broadcast.from_bytes(blob)
        if message.whole or len(message.parts) > 1:
            raise CodecMismatchError(f"expected one difference, got {len(message.parts)} parts")
        for part in message.parts:
            if len(part) != self.code.nbytes:
                raise MalformedBodyError(f"expected {self.code.nbytes} bytes, got {len(part)}")
            held = held + self.code.decode(part)
        return message.round, held


class Banded(Peer):
    """A federation with a code up, and ``Relayed`` or ``Own`` down.

    Args:
        initial: the state that every participant derives from a seed.
        code: of updates.
        codec_bytes: what its bases cost a client once.
        down: code of ``Own``; relayed by default.
    """

    def __init__(
        self, initial: State, code: Code, codec_bytes: int = 0, down: Code | None = None
    ) -> None:
        start = flat(initial)
        # All clients decode the same bytes, so here it is done once.
        step_of = functools.lru_cache(maxsize=32)(self._step_of)
        self.relayed = Relayed(start, step_of)
        self.own = None if down is None else Own(start, down)
        super().__init__(initial, self.own or self.relayed)
        self.code, self.codec_bytes = code, codec_bytes
        self._came: dict[int, bytes] = {}

    def broadcast(self, client: int) -> bytes:
        """What this client lacks."""
        if self.own is None:
            return super().broadcast(client)
        blob = self.own.broadcast_to(client, self._sent_to.get(client, 0))
        self._sent_to[client] = self.round
        return blob

    def optimizer(
        self,
        client: int,
        parameters: Mapping[str, nn.Parameter],
        cls: type[torch.optim.Optimizer],
        **options: Any,
    ) -> torch.optim.Optimizer:
        """The plain one, without A where the code freezes it."""
        frozen = isinstance(self.code, Factors) and self.code.frozen
        moved = [p for n, p in parameters.items() if not (frozen and n.endswith(FROZEN))]
        return cls(moved, **options)

    def encode(self, client: int, update: Tensor) -> bytes:
        """The code of an update."""
        return self.code.encode(update, (client << 12) + self.memory(client).version)

    def read(self, reply: Reply) -> Tensor:
        """The update; the body is kept for a relay."""
        update = self.code.decode(reply.body)
        self._came[reply.client] = _EXAMPLES.pack(reply.examples) + reply.body
        return update

    def close_round(self) -> None:
        """As of every peer; the bodies that counted become the round's increment."""
        counted = sorted(self._replies)
        super().close_round()
        if self.own is None:
            self.relayed.rounds.append(b"".join(self._came[client] for client in counted))
        self._came = {}

    def _step_of(self, part: bytes) -> Tensor:
        """The server's own arithmetic, on the replies in the order of its sum."""
        size = _EXAMPLES.size + self.code.nbytes
        if not part or len(part) % size:
            raise MalformedBodyError(f"expected replies of {size} bytes each, got {len(part)}")
        replies = {}
        for i, at in enumerate(range(0, len(part), size)):
            (examples,) = _EXAMPLES.unpack_from(part, at)
            body = part[at + _EXAMPLES.size : at + size]
            replies[i] = (examples, self.code.decode(body))
        return self.lr * self.aggregate(replies)


def signs(
    kept: int,
    shrink: float = 1.0,
    down: int | None = None,
    which: str = "first",
    which_down: str = "first",
) -> Make:
    """``kept`` of 4096 rotated values up; ``down`` of them to each client, relayed by default."""

    def make(world: World) -> Banded | Coded:
        if down is None and shrink == 1.0:
            codec = RotatedSign(RotatedSignConfig(BLOCK, kept, which))
            return Coded(world.initial, codec, config=ServerConfig(relay=True))
        numel = UpdateSpec.of(world.initial).numel
        factor = None if down is None else contraction(down, which_down)
        back = None if factor is None else Signs(numel, down, factor, which_down)
        return Banded(world.initial, Signs(numel, kept, shrink, which), down=back)

    return make


def factors(a: int | None, b: int) -> Make:
    """``a`` and ``b`` of 4096 rotated values of the two factors up; ``None`` freezes A."""

    def make(world: World) -> Banded:
        share = None if a is None else (a, 1.0)
        return Banded(world.initial, Factors(UpdateSpec.of(world.initial), share, (b, 1.0)))

    return make


def banded(
    ratio: float,
    inside: tuple[int, int],
    outside: int,
    shrink: float = 1.0,
    share: str = "kind",
    basis_dtype: str = "int4",
) -> Make:
    """Two bands.

    Args:
        ratio: of the subspace.
        share: of the subspace.
        basis_dtype: of the subspace.
        inside: how many of a block's rotated values are sent, and the block.
        outside: the same of 4096.
        shrink: factor of what is decoded outside.
    """
    kept, block = inside

    def make(world: World) -> Banded:
        spec = UpdateSpec.of(world.initial)
        config = SubspaceConfig(
            ratio=ratio, allocation="tempered", side="long", share=share, basis_dtype=basis_dtype
        )
        name = f"signal-{ratio:g}-{share}-{basis_dtype}"
        codec, nbytes = fitted.kept(world, name, lambda: fitted.signal(world, config))
        bound = codec.bind(spec)
        assert isinstance(bound, Subspace)
        near = RotatedSignPacker(RotatedSignConfig(block=block, kept=kept))
        rest = Signs(spec.numel, outside, shrink)
        return Banded(world.initial, Bands(spec, bound, near, rest), nbytes)

    return make
