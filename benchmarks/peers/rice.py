"""Golomb-Rice code of sorted positions, which top-k methods send beside their values.

The gaps between k of n positions are nearly geometric, for which Golomb's code is the best prefix
code (Golomb 1966, run-length encodings); Rice's is Golomb's with a power of two for a divisor.

    gap = position - previous - 1;   gap = quotient * 2**b + remainder
    body = b (u8) | remainders, b bits each, to a whole byte | quotients in unary: zeros, a one

The divisor is the cheapest there is for these gaps. With b = 0 the code is a bitmap of n bits, so
a bitmap is never cheaper. Where more than half of the positions are taken, the others are coded.
Remainders and quotients lie apart, which is what makes both directions vectorisable.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradcodec.errors import LimitError, MalformedBodyError, TrailingBytesError, TruncatedError

_MOST_BITS = 24

Positions = NDArray[np.int64]


def encode_positions(positions: Positions, size: int) -> bytes:
    """Bytes of increasing ``positions`` below ``size``; the reader must know how many they are."""
    coded = _others(positions, size) if 2 * len(positions) > size else positions
    if not len(coded):
        return b""
    gaps = np.diff(coded, prepend=-1) - 1
    bits = min(range(_MOST_BITS + 1), key=lambda b: _nbytes(gaps, b))
    remainders = (gaps[:, None] >> np.arange(bits)) & 1
    ends = np.cumsum((gaps >> bits) + 1) - 1
    unary = np.zeros(ends[-1] + 1, np.uint8)
    unary[ends] = 1
    return bytes([bits]) + _packed(remainders.astype(np.uint8).reshape(-1)) + _packed(unary)


def decode_positions(body: bytes, size: int, count: int) -> Positions:
    """Inverse of ``encode_positions`` for ``count`` positions; raises ``WireError`` subclasses."""
    if count > size:
        raise LimitError(f"positions: expected at most {size}, got {count}")
    inverted = 2 * count > size
    coded = _decode(body, size, size - count if inverted else count)
    return _others(coded, size) if inverted else coded


def _decode(body: bytes, size: int, count: int) -> Positions:
    if not count:
        if body:
            raise TrailingBytesError(f"positions: expected no bytes, got {len(body)}")
        return np.empty(0, np.int64)
    if not body:
        raise TruncatedError(f"positions: expected {count}, got no bytes")
    bits, cut = body[0], 1 + (count * body[0] + 7) // 8
    if bits > _MOST_BITS:
        raise LimitError(f"positions: expected a divisor of at most 2^{_MOST_BITS}, got 2^{bits}")
    if len(body) <= cut:
        raise TruncatedError(f"positions: expected more than {cut} bytes, got {len(body)}")
    ends = np.flatnonzero(_unpacked(body[cut:]))
    if len(ends) != count or len(body) - cut != ends[-1] // 8 + 1:
        raise MalformedBodyError(f"positions: expected {count} and no padding, got {len(ends)}")
    remainders = _unpacked(body[1:cut])[: count * bits].reshape(count, bits).astype(np.int64)
    quotients = np.diff(ends, prepend=-1) - 1
    gaps = (quotients << bits) + (remainders << np.arange(bits)).sum(1)
    # Gaps are bounded before they are added up, so that the sum cannot overflow.
    if int(gaps.max()) >= size or int((gaps + 1).sum()) > size:
        raise MalformedBodyError(f"positions: expected all below {size}")
    return np.cumsum(gaps + 1) - 1


def _nbytes(gaps: Positions, bits: int) -> int:
    # Whole bytes, not bits: both parts are padded, which can cost more than a divisor saves.
    return (len(gaps) * bits + 7) // 8 + (int((gaps >> bits).sum()) + len(gaps) + 7) // 8


def _others(positions: Positions, size: int) -> Positions:
    free = np.ones(size, bool)
    free[positions] = False
    return np.flatnonzero(free)


def _packed(bits: NDArray[np.uint8]) -> bytes:
    return np.packbits(bits, bitorder="little").tobytes()


def _unpacked(packed: bytes) -> NDArray[np.uint8]:
    return np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
