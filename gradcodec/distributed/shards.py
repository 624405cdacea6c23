"""Who owns which shard: fixed functions of (numel, world size, name), never of a bucket.

A flat parameter is cut into ``world`` contiguous shards. Shard ``i`` belongs to rank
``(i + first_owner(name)) % world``. Small parameters fill fewer shards than there are ranks; this
spreads them over the ranks instead of giving all to rank 0.
"""

from __future__ import annotations

import zlib

ALIGN = 4096
"""Shards of coded parameters start at multiples of this: whole blocks, whole rotated chunks."""

Ranges = list[tuple[int, int]]
"""``(start, stop)`` of each shard of a flat tensor, in order."""

_MASK = (1 << 64) - 1


def shard_ranges(numel: int, world: int, align: int = ALIGN) -> Ranges:
    """``world`` consecutive ranges ``(start, stop)`` that cover ``range(numel)``.

    They start at multiples of ``align``, and their lengths differ by at most ``align`` (the last
    nonempty one may be shorter). With fewer than ``world * align`` elements some may be empty.
    """
    whole, extra = divmod(-(-numel // align), world)
    stops, at = [], 0
    for i in range(world):
        at = min(numel, at + (whole + (i < extra)) * align)
        stops.append(at)
    return list(zip([0, *stops], stops, strict=False))


def first_owner(name: str, world: int) -> int:
    """Rank that owns a parameter's first shard."""
    return zlib.crc32(name.encode()) % world


def derive_seed(*numbers: int) -> int:
    """Mix integers to a seed of 63 bits, by splitmix64 over each in turn."""
    state = 0
    for number in numbers:
        state = (state + (number & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1
