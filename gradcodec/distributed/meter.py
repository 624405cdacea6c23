"""What an exchange moved and how long its parts took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Bytes and seconds of this rank; sums with ``+``.

    Attributes:
        dense: bytes of the tensors that were exchanged, as they lie in memory.
        wire: bytes this rank sent to other ranks, headers included. A dense ring all-reduce sends
            ``2 (W - 1) / W * dense``.
        encode: seconds of encoding, also of the owner's second encoding.
        exchange: seconds in collectives, waiting for slower ranks included.
        decode: seconds of decoding and averaging.
    """

    dense: int = 0
    wire: int = 0
    encode: float = 0.0
    exchange: float = 0.0
    decode: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.dense + other.dense,
            self.wire + other.wire,
            self.encode + other.encode,
            self.exchange + other.exchange,
            self.decode + other.decode,
        )


class Meter:
    """Collects a ``Traffic`` while an exchange runs."""

    def __init__(self) -> None:
        self.dense = 0
        self.wire = 0
        self.seconds = {"encode": 0.0, "exchange": 0.0, "decode": 0.0}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's seconds under ``"encode"``, ``"exchange"`` or ``"decode"``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    @property
    def traffic(self) -> Traffic:
        """What was counted so far."""
        return Traffic(self.dense, self.wire, **self.seconds)
