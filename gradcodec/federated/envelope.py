"""The few bytes around payloads that a federation needs: who, when, how many samples.

    reply      client u32, round u32, examples u32, payload, crc32 u32
    broadcast  round u32, count u16, per part (kind u8, length u64, payload), crc32 u32

All integers little-endian; the CRC-32 covers everything before it, so that a flipped bit in a
sample count cannot change a weight. These bytes are counted as wire bytes like all others.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from gradcodec.errors import (
    ChecksumError,
    LimitError,
    MalformedBodyError,
    TrailingBytesError,
    TruncatedError,
)
from gradcodec.wire import Payload

_REPLY = struct.Struct("<III")
_BROADCAST = struct.Struct("<IH")
_PART = struct.Struct("<BQ")
_CRC_BYTES = 4

INCREMENT, SNAPSHOT, CODEC = 1, 2, 3
FIXED = (INCREMENT, SNAPSHOT)
KINDS = (*FIXED, CODEC)


@dataclass(frozen=True)
class Reply:
    """A client's answer: its update, and the number of examples it was trained on."""

    client: int
    round: int
    examples: int
    payload: Payload

    def to_bytes(self) -> bytes:
        """The bytes of the uplink."""
        head = _REPLY.pack(self.client, self.round, self.examples)
        return _sealed(head + self.payload.to_bytes())

    @classmethod
    def from_bytes(cls, blob: bytes) -> Reply:
        """Inverse of ``to_bytes``; raises ``WireError`` subclasses."""
        blob = _opened(blob, _REPLY.size, "reply")
        client, number, examples = _REPLY.unpack_from(blob)
        if examples == 0:
            raise MalformedBodyError(f"client {client}: expected at least one example, got 0")
        return cls(client, number, examples, Payload.from_bytes(blob[_REPLY.size :]))


@dataclass(frozen=True)
class Broadcast:
    """What brings a client to ``round``: increments in order, or one snapshot.

    Between them may be codecs (``gradcodec.federated.switch``): what follows one is written in it.
    """

    round: int
    parts: tuple[tuple[int, bytes], ...]

    @property
    def payload_nbytes(self) -> int:
        """Bytes of the payloads' bodies, and of codecs whole."""
        return sum(
            len(part) if kind == CODEC else len(Payload.from_bytes(part).body)
            for kind, part in self.parts
        )

    def to_bytes(self) -> bytes:
        """The bytes of the downlink."""
        out = [_BROADCAST.pack(self.round, len(self.parts))]
        for kind, blob in self.parts:
            out += [_PART.pack(kind, len(blob)), blob]
        return _sealed(b"".join(out))

    @classmethod
    def from_bytes(cls, blob: bytes, kinds: tuple[int, ...] = FIXED) -> Broadcast:
        """Inverse of ``to_bytes``; raises ``WireError`` subclasses.

        Args:
            blob: what was received.
            kinds: parts that the receiver takes; one whose codec is fixed takes no other.
        """
        blob = _opened(blob, _BROADCAST.size, "broadcast")
        number, count = _BROADCAST.unpack_from(blob)
        at = _BROADCAST.size
        parts: list[tuple[int, bytes]] = []
        for _ in range(count):
            if len(blob) - at < _PART.size:
                raise TruncatedError(f"broadcast: {count} parts announced, {len(parts)} came")
            kind, length = _PART.unpack_from(blob, at)
            at += _PART.size
            if kind not in kinds:
                raise LimitError(f"broadcast: expected a part of kind {kinds}, got {kind}")
            if length > len(blob) - at:
                raise TruncatedError(f"broadcast: part of {length} bytes, {len(blob) - at} left")
            parts.append((kind, bytes(blob[at : at + length])))
            at += length
        if at != len(blob):
            raise TrailingBytesError(f"broadcast ends at byte {at}, got {len(blob)} bytes")
        return cls(number, tuple(parts))


def _sealed(message: bytes) -> bytes:
    return message + zlib.crc32(message).to_bytes(_CRC_BYTES, "little")


def _opened(blob: bytes, head: int, what: str) -> bytes:
    """The message without its checksum, which was right."""
    if len(blob) < head + _CRC_BYTES:
        raise TruncatedError(
            f"{what}: expected at least {head + _CRC_BYTES} bytes, got {len(blob)}"
        )
    message, crc = blob[:-_CRC_BYTES], int.from_bytes(blob[-_CRC_BYTES:], "little")
    actual = zlib.crc32(message)
    if crc != actual:
        raise ChecksumError(f"{what}: expected CRC-32 {crc:08x}, the bytes have {actual:08x}")
    return message
