"""How a server's global vector reaches clients: as states, or as increments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.federated.body import Reader, value_bytes
from benchmarks.peers.federated.envelope import Broadcast
from gradcodec.errors import CodecMismatchError, ConfigError

Pack = Callable[[Tensor], bytes]
Unpack = Callable[[bytes], Tensor]


class States:
    """Every round's message is one state; a client that missed rounds needs just the newest.

        vector (- start) --pack--> body --unpack--> (start +) what the client trains from

    All participants derive the start from a seed, so nothing is sent before the first round is
    closed.

    Args:
        start: the initial vector ``[n]``.
        pack, unpack: the code; raw fp32 values by default, which is exact.
        relative: the difference to the start is coded instead of the values themselves.
    """

    def __init__(
        self,
        start: Tensor,
        pack: Pack | None = None,
        unpack: Unpack | None = None,
        *,
        relative: bool = False,
    ) -> None:
        self.start, self.vector = start, start.clone()
        self.version = 0
        self.relative = relative
        self._pack = pack or raw_fp32
        self._unpack = unpack or (lambda body: read_fp32(body, start.numel()))

    def first(self) -> Tensor:
        """What a client that received nothing yet trains from."""
        return self.start.clone() if self.relative else self.read(self.write(self.start))

    def move(self, step: Tensor) -> None:
        """The server goes on to the next round's vector."""
        self.vector = self.vector + step
        self.version += 1

    def broadcast(self, version: int) -> bytes:
        """What a client at ``version`` needs to be at the current one."""
        if not 0 <= version <= self.version:
            raise ConfigError(f"expected a version of 0..{self.version}, got {version}")
        if version == self.version:
            return Broadcast(self.version).to_bytes()
        return Broadcast(self.version, (self.write(self.vector),), whole=True).to_bytes()

    def arrive(self, held: Tensor, version: int, blob: bytes) -> tuple[int, Tensor]:
        """At the client: the version and the vector after a broadcast, from bytes alone."""
        message = Broadcast.from_bytes(blob)
        if not message.parts:
            if message.round != version:
                raise CodecMismatchError(f"an empty broadcast of {message.round} at {version}")
            return message.round, held
        if not message.whole:
            raise CodecMismatchError("expected a whole state, got increments")
        return message.round, self.read(message.parts[0])

    def write(self, vector: Tensor) -> bytes:
        """The body that stands for a vector."""
        return self._pack(vector - self.start if self.relative else vector)

    def read(self, body: bytes) -> Tensor:
        """Inverse of ``write``, as well as the code can."""
        value = self._unpack(body)
        return self.start + value if self.relative else value


class Increments(States):
    """Every round's message is a coded difference; all participants add the same numbers.

        step + residual --pack--> body --unpack--> sent;   residual <- what was not sent

    The global vector is what clients can know: the sum of what was sent. A client that missed
    rounds gets all their increments, or the vector in fp32 where that is fewer bytes.

    Args:
        start: the initial vector ``[n]``.
        pack, unpack: the code of increments.
        feedback: keep what the code lost and add it to the next step.
    """

    def __init__(self, start: Tensor, pack: Pack, unpack: Unpack, *, feedback: bool = True) -> None:
        super().__init__(start)
        self.code, self.decode = pack, unpack
        self.feedback = feedback
        self.residual = torch.zeros_like(start)
        self.sent: list[bytes] = []

    def move(self, step: Tensor) -> None:
        """The server moves by what its message decodes to."""
        wanted = step + self.residual
        body = self.code(wanted)
        arrives = self.decode(body)
        if self.feedback:
            self.residual = wanted - arrives
        self.sent.append(body)
        super().move(arrives)

    def broadcast(self, version: int) -> bytes:
        """The increments that a client missed, or the vector."""
        whole = super().broadcast(version)
        missed = Broadcast(self.version, tuple(self.sent[version:])).to_bytes()
        return min(missed, whole, key=len)

    def arrive(self, held: Tensor, version: int, blob: bytes) -> tuple[int, Tensor]:
        """Add the increments, in order."""
        message = Broadcast.from_bytes(blob)
        if message.whole or not message.parts:
            return super().arrive(held, version, blob)
        if version + len(message.parts) != message.round:
            raise CodecMismatchError(
                f"{len(message.parts)} increments do not lead from {version} to {message.round}"
            )
        for part in message.parts:
            held = held + self.decode(part)
        return message.round, held


def raw_fp32(vector: Tensor) -> bytes:
    """Four bytes a value."""
    return value_bytes(vector, torch.float32)


def read_fp32(body: bytes, size: int) -> Tensor:
    """Inverse of ``raw_fp32``."""
    reader = Reader(body, "fp32 values")
    values = reader.values(size, torch.float32)
    reader.end()
    return values
