"""The replies of a round in the server's own hand: an increment that clients average themselves.

    "GL" 1 | base 8 | codec u8 | digest 8 | replies: weight varint, length varint, body; to the end

``base`` is the lineage that the round started from. The replies of a round belong to one codec, so
their headers shrink to one; ``codec`` and ``digest`` are those of their payloads. They carry no
names, and are sorted by weight and body: their order does not tell who sent them.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """A round's replies.

    Attributes:
        base: 8 bytes, the lineage of the state that they were trained from.
        codec, digest: of all their payloads.
        replies: weight and body of each, at least one.
    """

    base: bytes
    codec: str
    digest: bytes
    replies: tuple[tuple[int, bytes], ...]

    @classmethod
    def of(cls, base: bytes, replies: Sequence[tuple[int, Payload]]) -> Relayed:
        """The increment of these replies, weight and payload of each, all of one codec."""
        first = replies[0][1]
        bodies = sorted((weight, payload.body) for weight, payload in replies)
        return cls(base, first.codec, first.digest, tuple(bodies))

    @property
    def body_nbytes(self) -> int:
        """Bytes of the replies' bodies."""
        return sum(len(body) for _, body in self.replies)

    def payloads(self, base: bytes | None) -> list[tuple[int, Payload]]:
        """Weight and payload of each reply, relative to ``base``."""
        return [(w, Payload(self.codec, self.digest, body, base=base)) for w, body in self.replies]

    def to_bytes(self) -> bytes:
        """The bytes of the increment."""
        out = [MAGIC, bytes([VERSION]), self.base, bytes([CODEC_IDS[self.codec]]), self.digest]
        for weight, body in self.replies:
            out += [_varint(weight), _varint(len(body)), body]
        return b"".join(out)

    @classmethod
    def from_bytes(cls, blob: bytes) -> Relayed:
        """Inverse of ``to_bytes``.

        Raises:
            WireError: one named subclass per way the bytes can be wrong.
        """
        reader = _Reader(memoryview(blob), 0)
        magic = bytes(reader.take(len(MAGIC), "relay"))
        if magic != MAGIC:
            raise BadMagicError(
                f"expected relayed replies, magic {MAGIC!r}, got {magic!r}: both ends need the "
                "same ServerConfig.relay"
            )
        version = reader.take(1, "relay version")[0]
        if version != VERSION:
            raise UnsupportedVersionError(f"relay: expected version {VERSION}, got {version}")
        base = bytes(reader.take(DIGEST_BYTES, "base digest"))
        codec = reader.take(1, "codec")[0]
        if codec not in _CODECS:
            raise UnknownCodecError(f"relay: expected a codec of {sorted(_CODECS)}, got {codec}")
        digest = bytes(reader.take(DIGEST_BYTES, "codec digest"))
        replies = []
        while reader.left:
            weight = reader.varint("weight")
            if not weight:
                raise MalformedBodyError("relay: expected a weight of at least 1, got 0")
            body = bytes(reader.take(reader.varint("body length"), "body"))
            replies.append((weight, body))
        if not replies:
            raise MalformedBodyError("relay: expected at least one reply, got none")
        return cls(base, _CODECS[codec], digest, tuple(replies))


def is_relayed(increment: bytes) -> bool:
    """Whether an increment holds replies instead of one payload."""
    return increment[: len(MAGIC)] == MAGIC
