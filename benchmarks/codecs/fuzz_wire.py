"""Damaged payloads against every decoder: each must end in an update or a ``WireError``.

    python -m benchmarks.codecs.fuzz_wire --count 100000 --seed 0

1. Sources: the golden payloads of ``tests/golden`` and a fresh one of each conformance case.
2. Each is damaged in one of six ways. A quarter get a checksum that fits; another quarter are
   damaged inside their tensor table or body only, and get lengths that fit as well, so that they
   reach the table's rows and the body's values.
3. Each is read and decoded by the codec that it came from, or that its digest names.

Exits with 1 if anything else than an update or a ``WireError`` came out, if an update had another
tensor table than its payload, or if damage without a repaired checksum went unseen.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import resource
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.run import ROOT
from gradcodec import describe
from gradcodec.codec import Codec
from gradcodec.errors import WireError
from gradcodec.types import UpdateSpec
from gradcodec.wire import Payload, spec_to_bytes

TESTS = ROOT / "tests"
RESULTS = ROOT / "benchmarks" / "results" / "fuzz_wire.jsonl"

DECODED = "decoded"
SURPRISES = "anything else"
KEPT_EXAMPLES = 5


@dataclass(frozen=True)
class Source:
    """An undamaged payload and the codec that reads it."""

    name: str
    codec: Codec
    blob: bytes


@dataclass
class Tally:
    """What came out.

    Attributes:
        outcomes: how often an update or each error class came out.
        repaired: the same, of those whose checksum had been repaired.
        surprises: first few of anything else, with the bytes that reproduce it.
        peak_bytes: most memory that Python allocated for one payload.
        longest: bytes of the longest payload.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    surprises: list[dict[str, str]] = field(default_factory=list)
    peak_bytes: int = 0
    longest: int = 0

    @property
    def surprised(self) -> int:
        """How many of anything else."""
        return self.outcomes[SURPRISES]


# -- sources -------------------------------------------------------------------------------------


def sources() -> list[Source]:
    """Golden payloads as they lie in their files, and fresh ones of every conformance case."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    golden = importlib.import_module("test_golden")
    conformance = importlib.import_module("conformance")
    out = [
        Source(f"golden {name}", make()[0], (golden.GOLDEN / f"{name}.bin").read_bytes())
        for name, make in golden.CASES.items()
    ]
    update = conformance.mixed()
    for case in conformance.CASES:
        codec = case.for_(update)
        out.append(Source(f"fresh {case.name}", codec, codec.encoder.encode(update).to_bytes()))
    return out


# -- damage --------------------------------------------------------------------------------------


def flip(rng: random.Random, blob: bytes, other: bytes) -> bytes:
    """One to eight bits."""
    out = bytearray(blob)
    for _ in range(rng.choice((1, 1, 2, 8))):
        bit = rng.randrange(8 * len(out))
        out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def set_bytes(rng: random.Random, blob: bytes, other: bytes) -> bytes:
    """One to four bytes, to extreme or random values."""
    out = bytearray(blob)
    for _ in range(rng.choice((1, 1, 2, 4))):
        out[rng.randrange(len(out))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(out)


def truncate(rng: random.Random, blob: bytes, other: bytes) -> bytes:
    """The first few bytes only."""
    return blob[: rng.randrange(len(blob))]


def insert(rng: random.Random, blob: bytes, other: bytes) -> bytes:
    """Random bytes or a copy of the payload's own, somewhere inside."""
    at, count = rng.randrange(len(blob) + 1), rng.choice((1, 2, 8, 64))
    start = rng.randrange(len(blob))
    piece = rng.randbytes(count) if rng.random() < 0.5 else blob[start : start + count]
    return blob[:at] + piece + blob[at:]


def splice(rng: random.Random, blob: bytes, other: bytes) -> bytes:
    """The start of one payload and the end of another, or another's bytes in the middle."""
    at, start = rng.randrange(len(blob) + 1), rng.randrange(len(other))
    if rng.random() < 0.5:
        return blob[:at] + other[start:]
    piece = other[start : start + rng.choice((1, 4, 16, 64))]
    return blob[:at] + piece + blob[at + len(piece) :]


def edit_length(rng: random.Random, blob: bytes, other: bytes) -> bytes:
    """Another number where a length may stand: right after the digests, or anywhere."""
    at = rng.choice((13, 21)) if rng.random() < 0.3 else rng.randrange(len(blob))
    value = rng.choice((0, 1, 127, 128, 1 << 14, 1 << 20, 1 << 32, 1 << 48, 1 << 62, len(blob)))
    return blob[:at] + varint(value) + blob[at + 1 :]


DAMAGE: tuple[Callable[[random.Random, bytes, bytes], bytes], ...] = (
    flip,
    set_bytes,
    truncate,
    insert,
    splice,
    edit_length,
)


def varint(value: int) -> bytes:
    """Unsigned LEB128, written here a second time: a fuzzer shares no code with its subject."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def sealed(head: bytes) -> bytes:
    """Bytes with the CRC-32 that belongs to them."""
    return head + zlib.crc32(head).to_bytes(4, "little")


def parts(blob: bytes) -> tuple[bytes, bytes, bytes]:
    """Header with its digests, tensor table (empty if there is none), body of a good payload."""
    head = blob[: 21 if blob[4] & 2 else 13]
    payload = Payload.from_bytes(blob)
    table = b"" if payload.spec is None else spec_to_bytes(payload.spec)
    return head, table, payload.body


def damaged_inside(rng: random.Random, blob: bytes, other: bytes) -> bytes:
    """Damage to the table or the body alone, in a frame that fits it."""
    head, *mine = parts(blob)
    theirs = parts(other)[1:]
    which = rng.randrange(2) if mine[0] and mine[1] else int(not mine[0])
    if mine[which]:
        mine[which] = rng.choice(DAMAGE)(rng, mine[which], theirs[which] or blob)
    else:
        mine[which] = rng.randbytes(rng.choice((1, 4, 64)))
    table = varint(len(mine[0])) + mine[0] if blob[4] & 1 else b""
    return sealed(head + table + varint(len(mine[1])) + mine[1])


# -- the run -------------------------------------------------------------------------------------


def outcome(blob: bytes, codec: Codec, by_digest: dict[bytes, Codec]) -> str:
    """Read and decode: ``DECODED`` or the class of the ``WireError``; other errors go through."""
    try:
        payload = Payload.from_bytes(blob)
        codec = by_digest.get(payload.digest, codec)
        decoded = codec.decoder.decode(payload)
    except WireError as err:
        return type(err).__name__
    table = codec.spec if payload.spec is None else payload.spec
    if UpdateSpec.of(decoded) != table:
        raise AssertionError(f"decoded {UpdateSpec.of(decoded)}, the table says {table}")
    return DECODED


def fuzz(count: int, seed: int) -> Tally:
    """Damage and decode ``count`` payloads; equal seeds damage equally."""
    rng, tally, known = random.Random(seed), Tally(), sources()
    by_digest = {s.codec.digest: s.codec for s in known}
    originals = {s.blob for s in known}
    for s in known:  # also loads whatever is loaded late, before memory is measured
        if outcome(s.blob, s.codec, by_digest) != DECODED:
            raise AssertionError(f"{s.name} does not decode undamaged")
    tracemalloc.start()
    for _ in range(count):
        source, other = rng.choice(known), rng.choice(known)
        repair, inside = rng.random() < 0.5, rng.random() < 0.5
        if repair and inside:
            blob = damaged_inside(rng, source.blob, other.blob)
        else:
            blob = rng.choice(DAMAGE)(rng, source.blob, other.blob)
            blob = sealed(blob[:-4]) if repair else blob
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        trouble = None
        try:
            name = outcome(blob, source.codec, by_digest)
            if name == DECODED and not repair and blob not in originals:
                trouble = "damage that the checksum did not show"
        except Exception as err:
            trouble = f"{type(err).__name__}: {err}"
        peak = tracemalloc.get_traced_memory()[1] - before
        tally.peak_bytes = max(tally.peak_bytes, peak)
        tally.longest = max(tally.longest, len(blob))
        if trouble is not None:
            name = SURPRISES
            if len(tally.surprises) < KEPT_EXAMPLES:
                found = {"source": source.name, "error": trouble, "bytes": blob.hex()}
                tally.surprises.append(found)
        tally.outcomes[name] += 1
        tally.repaired[name] += repair
    tracemalloc.stop()
    return tally


def rss_bytes() -> int:
    """Largest resident size of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def commit() -> str | None:
    """The commit that a number belongs to, marked if the tree differs from it."""
    asked = ["git", "--no-optional-locks", "describe", "--always", "--abbrev=40", "--dirty"]
    git = subprocess.run([*asked, "--exclude=*"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or None


def measure(count: int, seed: int) -> dict[str, Any]:
    """One row: outcomes, memory, seconds, versions."""
    sources()  # what importing and encoding need is not counted as growth
    before, began = rss_bytes(), time.perf_counter()
    tally = fuzz(count, seed)
    return {
        "benchmark": "fuzz_wire",
        "count": count,
        "seed": seed,
        "sources": len(sources()),
        "outcomes": dict(sorted(tally.outcomes.items(), key=lambda item: -item[1])),
        "outcomes_repaired": dict(tally.repaired),
        "anything_else": tally.surprised,
        "surprises": tally.surprises,
        "peak_python_bytes": tally.peak_bytes,
        "longest_payload_bytes": tally.longest,
        "rss_growth_bytes": rss_bytes() - before,
        "seconds": round(time.perf_counter() - began, 2),
        "versions": describe.versions(),
        "cpus": os.cpu_count(),
        "commit": commit(),
    }


def report(row: dict[str, Any]) -> str:
    """The row as a table."""
    lines = [f"{'outcome':28} {'all':>9} {'repaired':>9}"]
    for name, total in row["outcomes"].items():
        lines.append(f"{name:28} {total:9,} {row['outcomes_repaired'][name]:9,}")
    lines += [
        f"{SURPRISES + ', total':28} {row['anything_else']:9,}",
        f"payloads {row['count']:,} from {row['sources']} sources, seed {row['seed']}",
        f"peak of Python's memory for one payload {row['peak_python_bytes']:,} bytes, "
        f"longest payload {row['longest_payload_bytes']:,} bytes",
        f"growth of the resident size {row['rss_growth_bytes']:,} bytes",
        f"seconds {row['seconds']} (with memory tracing)",
    ]
    lines += [f"{s['source']}: {s['error']}\n    {s['bytes']}" for s in row["surprises"]]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, append the row; 1 if anything else came out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.codecs.fuzz_wire", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--count", type=int, default=100_000, help="payloads (100000)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (0)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to append the row to")
    args = parser.parse_args(argv)
    row = measure(args.count, args.seed)
    print(report(row))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return 1 if row["anything_else"] else 0


if __name__ == "__main__":
    sys.exit(main())
