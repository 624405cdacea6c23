"""Payload <-> bytes. The format is specified in WIRE.md; this file and that page must agree.

    magic  version  codec  flags  digest   [base]   spec length  [spec]  body length  body  crc32
    "GC"   u8       u8     u8     8 bytes  8 bytes  varint               varint             u32

Nothing here knows how a body is made. Every length is checked against the bytes at hand before
anything is sliced, and nothing is allocated on the word of a length field.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from dataclasses import dataclass
from typing import Final, overload

import torch

from gradcodec.encodable import (
    DTYPE_CODES,
    MAX_DIMS,
    MAX_NAME_BYTES,
    MAX_NUMEL,
    MAX_TENSORS,
    shown,
)
from gradcodec.errors import (
    BadFlagsError,
    BadMagicError,
    ChecksumError,
    ConfigError,
    LimitError,
    MalformedSpecError,
    TrailingBytesError,
    TruncatedError,
    UnknownCodecError,
    UnsupportedVersionError,
    UpdateError,
)
from gradcodec.types import TensorSpec, UpdateSpec

MAGIC: Final = b"GC"
WIRE_VERSION: Final = 1
DIGEST_BYTES: Final = 8

#: Codec family -> wire id. Literal numbers, never reused; checked against the registry at import.
CODEC_IDS: Final[dict[str, int]] = {
    "identity": 1,
    "cast": 2,
    "blockquant": 3,
    "topk": 4,
    "subspace": 5,
    "autoencoder": 6,
    "chain": 7,
    "rotsign": 8,
    "per_tensor": 9,
}

FLAG_SPEC: Final = 1  # the tensor table is inside the payload
FLAG_BASE: Final = 2  # the payload is relative to a base with this digest
_KNOWN_FLAGS: Final = FLAG_SPEC | FLAG_BASE

_DTYPES: Final = {code: dtype for dtype, code in DTYPE_CODES.items()}
_HEADER_BYTES: Final = 5 + DIGEST_BYTES
_ROW_BYTES: Final = 3  # of the shortest row, a scalar with no name: name length, dtype, rank


class _Unread(bytes):
    """A tensor table as it came, not parsed yet."""


class _Table:
    """``Payload.spec``: parsed on first access.

    A decoder compares digests first, so a payload of another codec is refused without parsing its
    table, however long that is.
    """

    @overload
    def __get__(self, payload: None, owner: type) -> None: ...

    @overload
    def __get__(self, payload: Payload, owner: type) -> UpdateSpec | None: ...

    def __get__(self, payload: Payload | None, owner: type) -> UpdateSpec | None:
        if payload is None:
            return None  # the default of a payload made without a table
        held: UpdateSpec | _Unread | None = vars(payload)["spec"]
        if isinstance(held, _Unread):
            held = spec_from_bytes(held)
            vars(payload)["spec"] = held
        return held

    def __set__(self, payload: Payload, spec: UpdateSpec | None) -> None:
        vars(payload)["spec"] = spec


@dataclass(frozen=True, repr=False)
class Payload:
    """One encoded update: what an Encoder returns and a Decoder takes.

    Attributes:
        codec: family name, a key of ``CODEC_IDS``.
        digest: 8 bytes that pin the codec's config, weights and (if bound) tensor table.
        body: the codec's bytes.
        spec: the tensor table, when the codec is not bound to one already. ``from_bytes`` leaves
            it unparsed until it is accessed here; an invalid table then raises ``LimitError``,
            ``TruncatedError`` or ``MalformedSpecError``.
        base: 8 bytes that pin what the update is relative to, or ``None`` when unchecked.
    """

    codec: str
    digest: bytes
    body: bytes
    spec: _Table = _Table()
    base: bytes | None = None

    def __post_init__(self) -> None:
        for name, value in (("digest", self.digest), ("base", self.base)):
            if value is None and name == "base":
                continue
            if not isinstance(value, bytes) or len(value) != DIGEST_BYTES:
                raise ConfigError(f"{name} must be {DIGEST_BYTES} bytes, got {shown(value)}")
        if not isinstance(self.codec, str) or self.codec not in CODEC_IDS:
            raise ConfigError(f"codec must be one of {sorted(CODEC_IDS)}, got {shown(self.codec)}")
        if not isinstance(self.body, bytes):
            raise ConfigError(f"body must be bytes, got {type(self.body).__name__}")
        held = vars(self)["spec"]
        if held is not None and not isinstance(held, UpdateSpec | _Unread):
            raise ConfigError(f"spec must be an UpdateSpec, got {type(held).__name__}")

    @property
    def has_table(self) -> bool:
        """Whether the payload has a tensor table; this does not parse it."""
        return vars(self)["spec"] is not None

    def __repr__(self) -> str:
        base = None if self.base is None else self.base.hex()
        table = "a" if self.has_table else "no"
        return (
            f"Payload({self.codec}, digest {self.digest.hex()}, body of {len(self.body)} bytes, "
            f"{table} tensor table, base {base})"
        )

    def to_bytes(self) -> bytes:
        """The bytes that cross the wire; reported sizes are their ``len()``."""
        flags = (FLAG_SPEC if self.has_table else 0) | (FLAG_BASE if self.base is not None else 0)
        head = bytearray(MAGIC)
        head += bytes((WIRE_VERSION, CODEC_IDS[self.codec], flags))
        head += self.digest
        head += self.base or b""
        if self.has_table:
            held: UpdateSpec | _Unread = vars(self)["spec"]
            table = held if isinstance(held, _Unread) else spec_to_bytes(held)
            head += _varint(len(table)) + table
        head += _varint(len(self.body))
        crc = zlib.crc32(self.body, zlib.crc32(bytes(head)))
        return b"".join((head, self.body, crc.to_bytes(4, "little")))

    @classmethod
    def from_bytes(cls, blob: bytes) -> Payload:
        """Read a payload; the inverse of ``to_bytes``.

        A tensor table inside is kept as bytes and parsed when ``spec`` is first accessed.

        Raises:
            WireError: one named subclass for each way the bytes can be wrong (see WIRE.md).
        """
        try:
            view = memoryview(blob).toreadonly().cast("B")
        except TypeError as err:
            raise ConfigError(
                f"expected the bytes of a payload, got {type(blob).__name__}"
            ) from err
        if len(view) < len(MAGIC):
            raise TruncatedError(f"expected at least {_HEADER_BYTES} bytes, got {len(view)}")
        magic = bytes(view[:2])
        if magic != MAGIC:
            raise BadMagicError(f"expected magic {MAGIC!r}, got {magic!r}")
        if len(view) < _HEADER_BYTES:
            raise TruncatedError(f"expected at least {_HEADER_BYTES} bytes, got {len(view)}")
        version, codec_id, flags = view[2], view[3], view[4]
        if version != WIRE_VERSION:
            raise UnsupportedVersionError(f"this is wire version {WIRE_VERSION}, got {version}")
        names = {i: n for n, i in CODEC_IDS.items()}
        if codec_id not in names:
            raise UnknownCodecError(f"expected a codec id of {sorted(names)}, got {codec_id}")
        if flags & ~_KNOWN_FLAGS:
            raise BadFlagsError(f"expected flags within {_KNOWN_FLAGS:#04x}, got {flags:#04x}")
        reader = _Reader(view, 5)
        digest = bytes(reader.take(DIGEST_BYTES, "codec digest"))
        base = bytes(reader.take(DIGEST_BYTES, "base digest")) if flags & FLAG_BASE else None
        table = None
        if flags & FLAG_SPEC:
            table = reader.take(reader.varint("spec length"), "spec")
        body = reader.take(reader.varint("body length"), "body")
        end = reader.at
        crc = int.from_bytes(reader.take(4, "checksum"), "little")
        if reader.at != len(view):
            raise TrailingBytesError(f"payload ends at byte {reader.at}, got {len(view)} bytes")
        actual = zlib.crc32(view[:end])
        if crc != actual:
            raise ChecksumError(f"expected CRC-32 {crc:08x}, the bytes have {actual:08x}")
        payload = cls(names[codec_id], digest, bytes(body), base=base)
        if table is not None:
            vars(payload)["spec"] = _Unread(table)
        return payload


def spec_to_bytes(spec: UpdateSpec) -> bytes:
    """Tensor table: count, then per tensor name length, name, dtype code, rank, sizes."""
    out = bytearray(_varint(len(spec)))
    for t in spec:
        name = t.name.encode()
        out += _varint(len(name)) + name
        out += bytes((DTYPE_CODES[t.dtype], len(t.shape)))
        for size in t.shape:
            out += _varint(size)
    return bytes(out)


def spec_from_bytes(table: bytes | memoryview) -> UpdateSpec:
    """Inverse of ``spec_to_bytes``; raises ``WireError`` subclasses."""
    reader = _Reader(memoryview(table), 0)
    count = reader.varint("tensor count")
    if count > MAX_TENSORS:
        raise LimitError(f"expected at most {MAX_TENSORS} tensors, got {count}")
    if count * _ROW_BYTES > reader.left:
        raise TruncatedError(
            f"tensor table: expected {count} rows of at least {_ROW_BYTES} bytes, "
            f"{reader.left} bytes are left"
        )
    tensors, numel = [], 0
    for _ in range(count):
        length = reader.varint("name length")
        if length > MAX_NAME_BYTES:
            raise LimitError(f"expected a name of at most {MAX_NAME_BYTES} bytes, got {length}")
        raw = bytes(reader.take(length, "name"))
        try:
            name = raw.decode()
        except UnicodeDecodeError as err:
            raise MalformedSpecError(f"a tensor name is not UTF-8: {raw[:20]!r}") from err
        code, rank = reader.take(2, "dtype and rank")
        if code not in _DTYPES:
            raise MalformedSpecError(f"{name!r}: unknown dtype code {code}")
        if rank > MAX_DIMS:
            raise MalformedSpecError(
                f"{name!r}: expected at most {MAX_DIMS} dimensions, got {rank}"
            )
        spec = TensorSpec(name, tuple(reader.varint("size") for _ in range(rank)), _DTYPES[code])
        # Zero sizes count as one: torch makes no shape whose other sizes overflow either.
        if math.prod(max(size, 1) for size in spec.shape) > MAX_NUMEL:
            raise LimitError(f"{name!r}: expected at most {MAX_NUMEL} elements, got {spec.shape}")
        numel += spec.numel
        if numel > MAX_NUMEL:
            raise LimitError(f"expected at most {MAX_NUMEL} elements, got {numel}")
        tensors.append(spec)
    if reader.at != len(table):
        raise MalformedSpecError(f"{len(table) - reader.at} bytes after the last tensor")
    try:
        return UpdateSpec(tuple(tensors))
    except UpdateError as err:
        raise MalformedSpecError(str(err)) from err


def _varint(value: int) -> bytes:
    """Unsigned LEB128: seven bits a byte, least significant first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Reader:
    """A cursor that never reads past the end."""

    def __init__(self, view: memoryview, at: int) -> None:
        self.view, self.at = view, at

    @property
    def left(self) -> int:
        """Bytes behind the cursor."""
        return len(self.view) - self.at

    def take(self, count: int, what: str) -> memoryview:
        if count > self.left:
            raise TruncatedError(f"{what}: expected {count} bytes, {self.left} are left")
        self.at += count
        return self.view[self.at - count : self.at]

    def varint(self, what: str) -> int:
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1, what)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    raise LimitError(f"{what}: number not in its shortest form")
                return value
        raise LimitError(f"{what}: expected a number below 2^63")


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Little-endian bytes of a tensor's values, in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def raw_tensor(body: bytes | memoryview, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of ``raw_bytes``: a new 1-D tensor; whole items only."""
    if not len(body):
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(body), dtype=dtype)


def tensor_digest(tensor: torch.Tensor) -> str:
    """Hex SHA-256 of a tensor's dtype code, shape and little-endian bytes."""
    head = f"{DTYPE_CODES[tensor.dtype]}{tuple(tensor.shape)}".encode()
    return hashlib.sha256(head + raw_bytes(tensor)).hexdigest()
