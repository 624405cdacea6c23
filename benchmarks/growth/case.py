"""How time and memory grow: with the values of an update, and with the clients of a round.

    python -m benchmarks.run growth [--quick] [--schemes int4,topk,server]

1. Encoding and decoding a LoRA adapter of 1e5 to 1e9 values of noise by a codec of each kind, to
   bytes and from bytes, on one thread, each in a process of its own. Sizes for which the machine
   has too little free memory are left out and named.
2. A server's round with 1 to 10,000 replies (``benchmarks.federated.server_memory``).

Time is the processor's (``time.process_time``), because the machine may be shared, and is compared
with a copy of the update, measured in turns with it. Peak memory is that of
``benchmarks.measure.peak``. The page also says what ``benchmarks.growth.ranks`` computes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report, rows
from benchmarks.codecs import adapter
from benchmarks.federated import server_memory
from benchmarks.growth import page as pages
from benchmarks.measure import apart, peak
from benchmarks.run import Options, check_names
from gradcodec.registry import make_codec
from gradcodec.types import UpdateSpec
from gradcodec.wire import Payload

CASE = "growth"
NUMELS = (10**5, 10**6, 10**7, 10**8, 10**9)
REPLIES = (1, 10, 100, 1_000, 10_000)
SUBSPACE = "subspace-64-int4"
#: One of each kind; the others do the same work with other constants.
CODECS = (
    "fp16",
    "int8",
    "int4",
    "int2",
    "sign",
    "int4-rotated",
    "int4-unbiased",
    "topk",
    "rotsign",
    SUBSPACE,
)
SERVER = "server"
SERVER_NUMEL, SERVER_CODEC, HOLD_BYTES = 1_000_000, "int4", 16 << 20

#: Bytes that a size may need, in those of the update: it, at most twice as many to encode it (the
#: table of peaks), the message, and room.
ROOM = 4


def spec_of(numel: int) -> UpdateSpec:
    """A LoRA adapter (r = 8; q, k, v, o) of about so many values: layers of LLaMA-7B's width.

    Below one such layer the layer is narrower.
    """
    per_width = 8 * adapter.RANK  # four modules, two factors
    layers = max(1, round(numel / per_width / adapter.WIDTH))
    return adapter.adapter_spec(layers, round(numel / per_width / layers))


def free_bytes() -> int:
    """Memory that a new process can have without swapping; Linux only, else none is known."""
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def code(name: str, numel: int) -> rows.Row:
    """Cost of one codec on one size."""
    torch.set_num_threads(1)
    spec = spec_of(numel)
    update = adapter.noise(spec)
    codec = adapter.CODECS[name](spec) if name == SUBSPACE else make_codec(name).bind(spec)

    def copy() -> list[Tensor]:
        return [t.clone() for t in update.values()]

    def encode() -> bytes:
        return codec.encoder.encode(update).to_bytes()

    blob = encode()  # takes the codec's digest, once

    def decode() -> dict[str, Tensor]:
        return codec.decoder.decode(Payload.from_bytes(blob))

    decode()
    repeats = 15 if spec.numel < 3e6 else 5 if spec.numel < 3e8 else 3
    copied, encoded, decoded = _in_turns([copy, encode, decode], repeats)
    return {
        "numel": spec.numel,
        "tensors": len(spec),
        "update_bytes": spec.nbytes,
        "message_bytes": len(blob),
        "copy_s": copied,
        "encode_s": encoded,
        "decode_s": decoded,
        "encode_peak_bytes": peak(encode),
        "decode_peak_bytes": peak(decode),
    }


def _in_turns(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Median of the processor's seconds of each call."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, mine in zip(calls, seconds, strict=True):
            began = time.process_time()
            call()
            mine.append(time.process_time() - began)
    return [round(statistics.median(mine), 6) for mine in seconds]


def main(options: Options) -> list[str]:
    """Measure what is missing of what is asked for, a row each; then print and write the page."""
    known = (*CODECS, SERVER)
    check_names(options.schemes or (), known)
    asked = options.schemes or known
    path = options.out / f"{CASE}.jsonl"
    coded, served = pages.load(path)
    if options.again:
        coded, served = {}, {}
    failed = []
    for numel in NUMELS[: 2 if options.quick else None]:
        todo = [n for n in asked if n != SERVER and numel not in coded.get(n, {})]
        need = ROOM * 4 * numel
        if todo and need > free_bytes() > 0:
            print(f"{numel:.0e} values are left out: they may need {need / 1e9:.0f} GB", flush=True)
            continue
        for name in todo:
            stamp = rows.stamp(CASE, name, 0, {"numel": numel, "threads": 1})
            try:
                row = {**stamp, **apart(code, name, numel)}
            except Exception as error:  # one that does not run leaves the others
                failed.append(f"{CASE}: {name}, {numel:.0e}: {type(error).__name__}: {error}")
                continue
            rows.append(path, row)
            print(f"{name}, {numel:.0e}: encode {row['encode_s']} s", flush=True)
    numbers = REPLIES[: 3 if options.quick else None] if SERVER in asked else ()
    for replies in (n for n in numbers if n not in served):
        found = apart(server_memory.measure, replies, SERVER_NUMEL, SERVER_CODEC, HOLD_BYTES)
        config = {n: found.pop(n) for n in ("replies", "numel", "codec", "hold_bytes")}
        rows.append(path, {**found, **rows.stamp(CASE, SERVER, 0, config)})
        print(f"{replies} replies: {found['grown_bytes']:,} bytes", flush=True)
    made = page(path)
    print("no codec was measured" if made is None else made.write(path))
    return failed


def page(path: Path) -> report.Page | None:
    """The page of this case's rows."""
    return pages.page(path)
