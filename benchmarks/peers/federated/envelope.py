"""The bytes around a peer's messages: no more of them than around this project's own payloads.

    reply      client u32, round u32, examples u32, body, crc32 u32
    broadcast  round u32, count u16, parts, crc32 u32

All integers little-endian; the CRC-32 covers everything before it. Bit 15 of ``count`` says that
the one part is a whole state and not an increment. Every part but the last has its length (u32)
in front. This is ``gradcodec.federated.envelope`` without its payload headers, so what is counted
for a peer is never more than what the same body would cost here.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from gradcodec.errors import ChecksumError, LimitError, MalformedBodyError, TruncatedError

_REPLY = struct.Struct("<III")
_BROADCAST = struct.Struct("<IH")
_LENGTH = struct.Struct("<I")
_CRC_BYTES = 4
_WHOLE = 1 << 15

REPLY_OVERHEAD = _REPLY.size + _CRC_BYTES
BROADCAST_OVERHEAD = _BROADCAST.size + _CRC_BYTES


@dataclass(frozen=True)
class Reply:
    """A client's answer to the broadcast of ``round``."""

    client: int
    round: int
    examples: int
    body: bytes

    def to_bytes(self) -> bytes:
        """The bytes of the uplink."""
        return _sealed(_REPLY.pack(self.client, self.round, self.examples) + self.body)

    @classmethod
    def from_bytes(cls, blob: bytes) -> Reply:
        """Inverse of ``to_bytes``; raises ``WireError`` subclasses."""
        message = _opened(blob, _REPLY.size, "reply")
        client, number, examples = _REPLY.unpack_from(message)
        if examples == 0:
            raise MalformedBodyError(f"client {client}: expected at least one example, got 0")
        return cls(client, number, examples, message[_REPLY.size :])


@dataclass(frozen=True)
class Broadcast:
    """What brings a client to ``round``: nothing, increments in order, or one ``whole`` state."""

    round: int
    parts: tuple[bytes, ...] = ()
    whole: bool = False

    def to_bytes(self) -> bytes:
        """The bytes of the downlink."""
        if len(self.parts) >= _WHOLE:
            raise LimitError(f"broadcast: expected fewer than {_WHOLE} parts, got more")
        out = [_BROADCAST.pack(self.round, len(self.parts) | (_WHOLE if self.whole else 0))]
        for part in self.parts[:-1]:
            out += [_LENGTH.pack(len(part)), part]
        return _sealed(b"".join([*out, *self.parts[-1:]]))

    @classmethod
    def from_bytes(cls, blob: bytes) -> Broadcast:
        """Inverse of ``to_bytes``; raises ``WireError`` subclasses."""
        message = _opened(blob, _BROADCAST.size, "broadcast")
        number, count = _BROADCAST.unpack_from(message)
        whole, count = bool(count & _WHOLE), count & ~_WHOLE
        if whole and count != 1:
            raise MalformedBodyError(f"broadcast: expected one whole state, got {count}")
        at = _BROADCAST.size
        parts: list[bytes] = []
        for _ in range(count - 1):
            if len(message) - at < _LENGTH.size:
                raise TruncatedError(f"broadcast: {count} parts announced, {len(parts)} came")
            (length,) = _LENGTH.unpack_from(message, at)
            at += _LENGTH.size
            if length > len(message) - at:
                raise TruncatedError(f"broadcast: part of {length} bytes, {len(message) - at} left")
            parts.append(message[at : at + length])
            at += length
        if count:
            parts.append(message[at:])
        elif at != len(message):
            raise MalformedBodyError(f"broadcast without parts: {len(message) - at} bytes too many")
        return cls(number, tuple(parts), whole)


def _sealed(message: bytes) -> bytes:
    return message + zlib.crc32(message).to_bytes(_CRC_BYTES, "little")


def _opened(blob: bytes, head: int, what: str) -> bytes:
    """The message without its checksum, which was right."""
    least = head + _CRC_BYTES
    if len(blob) < least:
        raise TruncatedError(f"{what}: expected at least {least} bytes, got {len(blob)}")
    message, crc = blob[:-_CRC_BYTES], int.from_bytes(blob[-_CRC_BYTES:], "little")
    actual = zlib.crc32(message)
    if crc != actual:
        raise ChecksumError(f"{what}: expected CRC-32 {crc:08x}, the bytes have {actual:08x}")
    return message
