"""The few bytes around payloads that a federation needs: who, when, how many examples, which state.

    reply      "GR" 2 | round varint | examples varint | client | values length varint | values
               | update, the rest
    client     0..8 | that many bytes of a number        9 | length u8 | UTF-8 of a name
    broadcast  "GB" 2 | round varint | lineage 8 | parts: kind u8, length varint, bytes; to the end

``update`` and ``values`` are payloads. All integers are little-endian and in their shortest form.
Both messages end with the bitwise complement of the CRC-32 of everything before it, so a flipped
bit in the number of examples cannot change a weight. Version 1 ended with the CRC-32 itself and had
no magic; it is still read:

    reply 1      client u32, round u32, examples u32 | update
    broadcast 1  round u32, count u16 | parts: kind u8, length u64, bytes

These bytes are counted as wire bytes like all others.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from gradcodec.errors import (
    BadMagicError,
    ChecksumError,
    ConfigError,
    LimitError,
    MalformedBodyError,
    TrailingBytesError,
    TruncatedError,
    UnsupportedVersionError,
)
from gradcodec.federated.participants import MAX_NAME_BYTES, ClientId
from gradcodec.federated.relayed import Relayed, is_relayed
from gradcodec.wire import DIGEST_BYTES, Payload, _Reader, _varint

VERSION: Final = 2
_REPLY_MAGIC: Final = b"GR"
_BROADCAST_MAGIC: Final = b"GB"
_REPLY_1 = struct.Struct("<III")
_BROADCAST_1 = struct.Struct("<IH")
_PART_1 = struct.Struct("<BQ")
_CRC_BYTES: Final = 4
_NAME: Final = 9

INCREMENT, SNAPSHOT, CODEC, VALUES = 1, 2, 3, 4
FIXED = (INCREMENT, SNAPSHOT, VALUES)
KINDS = (*FIXED, CODEC)

Part = tuple[int, bytes]


@dataclass(frozen=True)
class Reply:
    """A client's answer: its update, and the number of examples it was trained on.

    Attributes:
        client: the sender's id. It is only a claim: the transport has to authenticate it.
        round: the round whose global state was trained.
        examples: the weight of this reply, at least 1.
        payload: the update; its ``base`` pins the state that was trained (``Replica.digest``).
        values: the tensors that travel bit for bit, if any of them changed (``split``).
        version: version of the envelope that the reply came in.
    """

    client: ClientId
    round: int
    examples: int
    payload: Payload
    values: Payload | None = None
    version: int = VERSION

    def to_bytes(self) -> bytes:
        """The bytes of the uplink, always in the newest version."""
        values = b"" if self.values is None else self.values.to_bytes()
        head = [_REPLY_MAGIC, bytes([VERSION]), _varint(self.round), _varint(self.examples)]
        return _sealed(
            b"".join(
                [*head, _client(self.client), _varint(len(values)), values, self.payload.to_bytes()]
            )
        )

    @classmethod
    def from_bytes(cls, blob: bytes) -> Reply:
        """Inverse of ``to_bytes``; also reads version 1.

        Raises:
            WireError: one named subclass per way the bytes can be wrong.
        """
        message, version = _opened(blob, _REPLY_MAGIC, "reply")
        if version == 1:
            if len(message) < _REPLY_1.size:
                raise TruncatedError(f"reply: expected {_REPLY_1.size} bytes, got {len(message)}")
            number, when, examples = _REPLY_1.unpack_from(message)
            payload = Payload.from_bytes(bytes(message[_REPLY_1.size :]))
            client: ClientId = number
            values = None
        else:
            reader = _Reader(message, len(_REPLY_MAGIC) + 1)
            when, examples = reader.varint("round"), reader.varint("examples")
            client = _read_client(reader)
            length = reader.varint("values length")
            kept = bytes(reader.take(length, "values"))
            values = Payload.from_bytes(kept) if length else None
            payload = Payload.from_bytes(bytes(message[reader.at :]))
        if examples == 0:
            raise MalformedBodyError(f"client {client!r}: expected at least one example, got 0")
        return cls(client, when, examples, payload, values, version)


@dataclass(frozen=True)
class Broadcast:
    """Brings a client to ``round``: by increments in order, or by one snapshot.

    Attributes:
        round: where the parts lead.
        parts: kind and bytes of each. A ``CODEC`` (``gradcodec.federated.switch``) may come before
            any of them: the parts after it are written in that codec. ``VALUES``, the tensors that
            travel bit for bit, come last.
        lineage: identifies how the state of ``round`` came about (``Replica.lineage``); ``None``
            in a message of version 1.
    """

    round: int
    parts: tuple[Part, ...]
    lineage: bytes | None

    @property
    def payload_nbytes(self) -> int:
        """Bytes of the payloads' bodies; codecs count as a whole."""
        return sum(len(part) if kind == CODEC else _body_nbytes(part) for kind, part in self.parts)

    def to_bytes(self) -> bytes:
        """The bytes of the downlink, always in the newest version."""
        assert self.lineage is not None, "a broadcast of version 1 is only read"
        out = [_BROADCAST_MAGIC, bytes([VERSION]), _varint(self.round), self.lineage]
        for kind, part in self.parts:
            out += [bytes([kind]), _varint(len(part)), part]
        return _sealed(b"".join(out))

    @classmethod
    def from_bytes(cls, blob: bytes, kinds: tuple[int, ...] = FIXED) -> Broadcast:
        """Inverse of ``to_bytes``; also reads version 1.

        Args:
            blob: what was received.
            kinds: kinds of parts that the receiver accepts; ``FIXED`` has no codecs.

        Raises:
            WireError: one named subclass per way the bytes can be wrong.
        """
        message, version = _opened(blob, _BROADCAST_MAGIC, "broadcast")
        if version == 1:
            return cls(*_parts_1(message, kinds), None)
        reader = _Reader(message, len(_BROADCAST_MAGIC) + 1)
        number = reader.varint("round")
        lineage = bytes(reader.take(DIGEST_BYTES, "lineage"))
        parts: list[Part] = []
        while reader.at < len(message):
            kind = _known_kind(reader.take(1, "kind of a part")[0], kinds)
            parts.append((kind, bytes(reader.take(reader.varint("part length"), "part"))))
        return cls(number, tuple(parts), lineage)


def _body_nbytes(part: bytes) -> int:
    if is_relayed(part):
        return Relayed.from_bytes(part).body_nbytes
    return len(Payload.from_bytes(part).body)


def part_nbytes(parts: list[Part]) -> int:
    """Bytes that these parts take in a broadcast."""
    return sum(1 + len(_varint(len(part))) + len(part) for _, part in parts)


def _parts_1(message: memoryview, kinds: tuple[int, ...]) -> tuple[int, tuple[Part, ...]]:
    if len(message) < _BROADCAST_1.size:
        raise TruncatedError(f"broadcast: expected {_BROADCAST_1.size} bytes, got {len(message)}")
    number, count = _BROADCAST_1.unpack_from(message)
    reader = _Reader(message, _BROADCAST_1.size)
    parts: list[Part] = []
    for _ in range(count):
        kind, length = _PART_1.unpack(reader.take(_PART_1.size, "part"))
        parts.append((_known_kind(kind, kinds), bytes(reader.take(length, "part"))))
    if reader.at != len(message):
        raise TrailingBytesError(f"broadcast ends at byte {reader.at}, got {len(message)} bytes")
    return number, tuple(parts)


def _known_kind(kind: int, kinds: tuple[int, ...]) -> int:
    if kind not in kinds:
        raise LimitError(f"broadcast: expected a part of kind {kinds}, got {kind}")
    return kind


def _client(client: ClientId) -> bytes:
    if isinstance(client, str):
        name = client.encode()
        return bytes([_NAME, len(name)]) + name
    size = (client.bit_length() + 7) // 8
    return bytes([size]) + client.to_bytes(size, "little")


def _read_client(reader: _Reader) -> ClientId:
    size = reader.take(1, "client")[0]
    if size < _NAME:
        number = bytes(reader.take(size, "client"))
        if number.endswith(b"\0"):
            raise LimitError("client: number not in its shortest form")
        return int.from_bytes(number, "little")
    if size > _NAME:
        raise LimitError(f"client: expected a size of 0..{_NAME}, got {size}")
    name = bytes(reader.take(reader.take(1, "client")[0], "client"))
    try:
        text = name.decode()
    except UnicodeDecodeError as err:
        raise MalformedBodyError(f"client: a name is not UTF-8: {name[:20]!r}") from err
    if not text:
        raise LimitError(f"client: expected a name of 1..{MAX_NAME_BYTES} bytes, got none")
    return text


def _sealed(message: bytes) -> bytes:
    return message + (zlib.crc32(message) ^ 0xFFFFFFFF).to_bytes(_CRC_BYTES, "little")


def _opened(blob: bytes, magic: bytes, what: str) -> tuple[memoryview, int]:
    """Check the checksum; returns the message without it, and its version.

    Version 1 has no magic: only its checksum, the complement of later ones, tells it from them.
    """
    try:
        view = memoryview(blob).toreadonly()
    except TypeError as err:
        raise ConfigError(f"expected the bytes of a {what}, got {type(blob).__name__}") from err
    shortest = len(magic) + 1 + _CRC_BYTES
    if len(view) < shortest:
        raise TruncatedError(f"{what}: expected at least {shortest} bytes, got {len(view)}")
    message, crc = view[:-_CRC_BYTES], int.from_bytes(view[-_CRC_BYTES:], "little")
    actual = zlib.crc32(message)
    if crc == actual:
        return message, 1
    if crc != actual ^ 0xFFFFFFFF:
        raise ChecksumError(f"{what}: its checksum {crc:08x} is not that of its bytes")
    if bytes(message[: len(magic)]) != magic:
        raise BadMagicError(f"{what}: expected magic {magic!r}, got {bytes(message[:2])!r}")
    version = message[len(magic)]
    if version != VERSION:
        raise UnsupportedVersionError(f"{what}: expected version 1 or {VERSION}, got {version}")
    return message, version
