"""The replies of a round as an increment: clients decode and average them as the server did.

    "GL" 1 | base 8 | rule 8 | codec u8 | digest 8 | body length varint
           | replies, up to the end: weight varint, body

``base`` is the lineage that the round started from. ``rule`` pins the settings that turn replies
into a step (``ServerConfig.rule``): without it, ends of other settings would come to other states
without noticing. All replies belong to one codec, so their headers shrink to one, and their bodies
have one length. They are sorted, so the same replies make the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from gradcodec.errors import (
    BadMagicError,
    MalformedBodyError,
    UnknownCodecError,
    UnsupportedVersionError,
)
from gradcodec.wire import CODEC_IDS, DIGEST_BYTES, Payload, _Reader, _varint

MAGIC: Final = b"GL"
VERSION: Final = 1
_CODECS: Final = {number: name for name, number in CODEC_IDS.items()}


@dataclass(frozen=True)
class Relayed:
    """A round's replies, which are read one by one.

    Attributes:
        base: 8 bytes, the lineage of the state that they were trained from.
        rule: 8 bytes, ``ServerConfig.rule``.
        codec, digest: of all their payloads.
        length: of each body, in bytes.
        replies: weight and body of each, as they are on the wire.
    """

    base: bytes
    rule: bytes
    codec: str
    digest: bytes
    length: int
    replies: bytes

    @classmethod
    def of(cls, base: bytes, rule: bytes, replies: Sequence[tuple[int, Payload]]) -> Relayed:
        """The increment of these replies: weight and payload of each, all of one codec."""
        first = replies[0][1]
        rows = sorted((weight, payload.body) for weight, payload in replies)
        packed = b"".join(_varint(weight) + body for weight, body in rows)
        return cls(base, rule, first.codec, first.digest, len(first.body), packed)

    def __iter__(self) -> Iterator[tuple[int, memoryview]]:
        """Weight and body of each reply.

        Raises:
            WireError: the bytes end within one, or a weight is 0.
        """
        reader = _Reader(memoryview(self.replies), 0)
        while reader.left:
            weight = reader.varint("weight")
            if not weight:
                raise MalformedBodyError("relay: expected a weight of at least 1, got 0")
            yield weight, reader.take(self.length, "body")

    @property
    def body_nbytes(self) -> int:
        """Bytes of all bodies."""
        return sum(self.length for _ in self)

    def to_bytes(self) -> bytes:
        """The bytes of the increment."""
        head = [MAGIC, bytes([VERSION]), self.base, self.rule, bytes([CODEC_IDS[self.codec]])]
        return b"".join([*head, self.digest, _varint(self.length), self.replies])

    @classmethod
    def from_bytes(cls, blob: bytes) -> Relayed:
        """Inverse of ``to_bytes``; replies are read by iteration.

        Raises:
            WireError: one named subclass per way the bytes can be wrong.
        """
        reader = _Reader(memoryview(blob), 0)
        magic = bytes(reader.take(len(MAGIC), "relay"))
        if magic != MAGIC:
            raise BadMagicError(f"relay: expected magic {MAGIC!r}, got {magic!r}")
        version = reader.take(1, "relay version")[0]
        if version != VERSION:
            raise UnsupportedVersionError(f"relay: expected version {VERSION}, got {version}")
        base, rule = (bytes(reader.take(DIGEST_BYTES, what)) for what in ("base digest", "rule"))
        codec = reader.take(1, "codec")[0]
        if codec not in _CODECS:
            raise UnknownCodecError(f"relay: expected a codec of {sorted(_CODECS)}, got {codec}")
        digest = bytes(reader.take(DIGEST_BYTES, "codec digest"))
        length = reader.varint("body length")
        if not reader.left:
            raise MalformedBodyError("relay: expected at least one reply, got none")
        return cls(base, rule, _CODECS[codec], digest, length, bytes(reader.view[reader.at :]))


def is_relayed(increment: bytes) -> bool:
    """Whether an increment holds replies instead of one payload."""
    return increment[: len(MAGIC)] == MAGIC
