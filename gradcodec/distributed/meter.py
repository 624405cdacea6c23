"""Bytes moved and seconds taken, by one exchange and by a whole training."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traffic:
    """Bytes and seconds of this rank; ``+`` adds two of them.

    Attributes:
        dense: bytes of the exchanged tensors in memory, before coding.
        wire: bytes that this rank sent to other ranks, headers included.
        encode: seconds of encoding, the owner's encoding of means included.
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


def ring_nbytes(dense: int, world: int) -> int:
    """Bytes that each rank sends in a dense ring all-reduce of ``dense`` bytes."""
    return 2 * (world - 1) * dense // max(world, 1)


@dataclass
class Counters:
    """Counts of one training, for ``Compression.stats`` and log lines.

    Attributes:
        log_every: steps between log lines, or ``None``.
        substituted: maps names of codecs that were asked for to the codecs used instead.
        traffic: bytes and seconds so far.
    """

    log_every: int | None = None
    substituted: Mapping[str, str] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def add(self, traffic: Traffic) -> None:
        """Count it; from any thread."""
        with self._lock:
            self.traffic += traffic

    def log(self, steps: int) -> None:
        """Write a line if one is due after ``steps`` steps."""
        if self.log_every is None or steps % self.log_every:
            return
        instead = "".join(f"; {new} in place of {old}" for old, new in self.substituted.items())
        logger.info(
            "gradcodec: after %d steps: %.1f MB of gradients, %.2f MB sent by this rank; "
            "seconds: encode %.2f, exchange %.2f, decode %.2f%s",
            steps,
            self.traffic.dense / 1e6,
            self.traffic.wire / 1e6,
            self.traffic.encode,
            self.traffic.exchange,
            self.traffic.decode,
            instead,
        )

    def stats(
        self,
        *,
        steps: int,
        dense_wire: int,
        residual_bytes: int = 0,
        codecs: Mapping[str, str],
        nmse: Mapping[str, float] | None = None,
        partial: Mapping[str, int] | None = None,
        auto: str | None = None,
    ) -> dict[str, Any]:
        """The dictionary that ``Compression.stats`` describes."""
        return {
            "steps": steps,
            "dense_bytes": self.traffic.dense,
            "dense_wire_bytes": dense_wire,
            "wire_bytes": self.traffic.wire,
            "residual_bytes": residual_bytes,
            "encode_seconds": self.traffic.encode,
            "exchange_seconds": self.traffic.exchange,
            "decode_seconds": self.traffic.decode,
            "codecs": dict(codecs),
            "substituted": dict(self.substituted),
            "nmse": dict(nmse or {}),
            "partial": dict(partial or {}),
            "auto": auto,
        }
