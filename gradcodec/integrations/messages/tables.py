"""Which tensors a message is of: their deflated table, and which of them are zeros and left out."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping

import numpy as np

from gradcodec.claims import check_claim
from gradcodec.errors import ConfigError, LimitError, MalformedBodyError, MalformedSpecError
from gradcodec.types import UpdateSpec
from gradcodec.wire import spec_from_bytes, spec_to_bytes

TABLE, STILL = "table", "still"

MAX_TABLE_BYTES = 16 << 20
"""Most bytes of a tensor table after inflating: about 10^5 tensors."""


def table_parts(spec: UpdateSpec) -> dict[str, bytes]:
    """The part that holds the table."""
    return {TABLE: zlib.compress(spec_to_bytes(spec), 9)}


def spec_of(parts: Mapping[str, bytes]) -> UpdateSpec | None:
    """The table of a message; ``None`` if it has none.

    Raises:
        WireError: it is damaged, invalid or too long.
    """
    return spec_from_bytes(_inflated(parts[TABLE])) if TABLE in parts else None


def still_parts(still: Collection[int], count: int) -> dict[str, bytes]:
    """The part that marks positions that are left out, a bit for each of ``count`` tensors."""
    return {STILL: np.packbits([position in still for position in range(count)]).tobytes()}


def still_of(parts: Mapping[str, bytes], count: int) -> frozenset[int]:
    """The positions of what was left out of ``count`` tensors.

    Raises:
        MalformedBodyError: the bits are not one for each tensor, or none of them is 1.
    """
    if STILL not in parts:
        return frozenset()
    bits = parts[STILL]
    ones = np.flatnonzero(np.unpackbits(np.frombuffer(bits, np.uint8)))
    if len(bits) != -(-count // 8) or not len(ones) or ones[-1] >= count:
        raise MalformedBodyError(f"expected a bit for each of {count} tensors, some of them 1")
    return frozenset(ones.tolist())


def check_zeros(spec: UpdateSpec, nbytes: int) -> None:
    """Check what zeros would take in memory, since they took nothing of the bytes that came.

    Raises:
        LimitError: it is more than ``gradcodec.claims`` allows for so many bytes.
    """
    try:
        check_claim("zeros that were left out", spec, nbytes)
    except ConfigError as err:
        raise LimitError(str(err)) from err


def _inflated(table: bytes) -> bytes:
    """A deflated table's bytes; no more than ``MAX_TABLE_BYTES`` are made of any input.

    Raises:
        LimitError: there would be more.
        MalformedSpecError: it is not one whole deflated string.
    """
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(table, MAX_TABLE_BYTES)
    except zlib.error as err:
        raise MalformedSpecError(f"expected a deflated tensor table: {err}") from err
    if not stream.eof and len(plain) >= MAX_TABLE_BYTES:
        raise LimitError(f"expected a tensor table of at most {MAX_TABLE_BYTES} bytes")
    if not stream.eof or stream.unused_data:
        raise MalformedSpecError("expected one whole deflated tensor table")
    return plain
