"""What a data-parallel step takes with more ranks than this machine has: computed, not measured.

An alpha-beta model: a message of ``s`` bytes takes ``alpha + s / beta``. Its assumptions:

- every rank has a machine and a full-duplex link of its own to all others, of rate ``beta``; no
  switch between them is a bottleneck, and no rank is late;
- plain DDP is a ring: ``2 (W - 1)`` messages one after the other, each of ``4 n / W`` bytes;
- ours is two swaps: in each a rank sends ``W - 1`` messages of a ``W``-th of the code, one after
  the other, as if none of their latencies overlapped, which is the worst case;
- a rank encodes its ``n`` values and the ``n / W`` that it owns, and decodes ``2 n`` values;
- nothing overlaps with the backward pass, neither way;
- seconds of computing and coding are those that ``ddp`` measured with 2 ranks, a core each, which a
  GPU would do in far less; with 4 ranks it shared 2 cores among them, so there the model promises
  more than was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks import rows
from benchmarks.links.link import Link

FLOAT = 4
DENSE = "ddp"
CODED = ("int4", "int2-rot", "sign-rot")
RANKS = (2, 4, 8, 16, 64, 256, 1024)

#: Seconds before the first byte of a message arrives, by link: a wide-area link, a switch of a
#: rack, a fast one.
LINKS = {
    Link("100 Mbit/s, 20 ms", 100): 20e-3,
    Link("1 Gbit/s, 0.1 ms", 1_000): 1e-4,
    Link("25 Gbit/s, 0.02 ms", 25_000): 2e-5,
}


@dataclass(frozen=True)
class Work:
    """What one rank does in a step with a scheme.

    Attributes:
        numel: values of the gradient.
        compute: seconds of a step without exchange.
        encode, decode: seconds a value.
        code_bytes: of all values as one code; ``None`` for plain DDP.
    """

    numel: float
    compute: float
    encode: float = 0.0
    decode: float = 0.0
    code_bytes: float | None = None

    def step(self, world: int, beta: float, alpha: float) -> float:
        """Seconds of a step of ``world`` ranks over links of ``beta`` bytes/s and latency alpha."""
        total = FLOAT * self.numel if self.code_bytes is None else self.code_bytes
        wire = 2 * (world - 1) * (alpha + total / world / beta)
        coding = self.numel * (self.encode * (1 + 1 / world) + self.decode * 2)
        return self.compute + coding + wire


def works(path: Path, name: str = "llama") -> dict[str, Work]:
    """The schemes that ``ddp.jsonl`` has with 2 ranks and an unshaped link; dense is first."""
    base = {row["scheme"]: row for row in _steps(path, name, 2) if row["link"] == "unshaped"}
    if DENSE not in base:
        return {}
    numel = base[DENSE]["sent"] / FLOAT  # of two ranks, a ring sends each value once
    compute = base[DENSE]["compute_s"]
    out = {DENSE: Work(numel, compute)}
    for scheme in (s for s in CODED if s in base):
        row = base[scheme]
        encode, decode = row["encode_s"] / 1.5 / numel, row["decode_s"] / 2 / numel
        out[scheme] = Work(numel, compute, encode, decode, row["sent"])
    return out


def measured(path: Path, world: int, link: str, name: str = "llama") -> dict[str, float]:
    """Median seconds of a step on a shaped link, by scheme."""
    return {r["scheme"]: r["p50_s"] for r in _steps(path, name, world) if r["link"] == link}


def _steps(path: Path, name: str, world: int) -> list[rows.Row]:
    return [
        row
        for row in rows.read(path)
        if "p50_s" in row and row["config"]["work"] == name and row["config"]["world"] == world
    ]
