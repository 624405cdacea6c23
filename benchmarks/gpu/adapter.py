"""Coding the adapter of a LLaMA-7B on the GPU: milliseconds from tensors to bytes and back.

    python -m benchmarks.gpu.adapter --out OUT [--device cpu]

The adapter is the one of ``benchmarks.codecs.adapter``: 256 tensors, 8,388,608 values. Encoding
ends with bytes in host memory, decoding starts there. Rows also say which share of the bytes is the
one that the CPU makes of the same values. A GPU rotates whole chunks in bf16, so there codecs with
``-rotated`` or ``-unbiased`` in their names differ in some codes, by one level.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import rows
from benchmarks.codecs.adapter import CODECS, adapter_spec, noise
from gradcodec.registry import UNTRAINED, make_codec
from gradcodec.wire import Payload

CASE = "gpu-adapter"


def milliseconds(call: Callable[[], Any], device: torch.device, repeats: int = 10) -> float:
    """Median of a call that ends when the device is idle."""
    call()
    taken = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return round(1e3 * statistics.median(taken), 3)


def measure(name: str, device: torch.device, layers: int) -> rows.Row:
    """Cost of one codec, and whether CPU and device agree."""
    spec = adapter_spec(layers)
    update = noise(spec)
    there = {n: t.to(device) for n, t in update.items()}
    codec = CODECS[name](spec) if name in CODECS else make_codec(name).bind(spec)
    mine = codec.to(device)
    blob = codec.encoder.encode(update).to_bytes()
    found = {
        "values": spec.numel,
        "body_bytes": codec.nbytes(spec),
        "encode_ms": milliseconds(lambda: mine.encoder.encode(there).to_bytes(), device),
        "decode_ms": milliseconds(lambda: mine.decoder.decode(Payload.from_bytes(blob)), device),
    }
    sent = mine.encoder.encode(there).to_bytes()
    found["same_bytes"] = round(
        1 - sum(a != b for a, b in zip(sent, blob, strict=True)) / len(blob), 6
    )
    ours, theirs = (
        mine.decoder.decode(Payload.from_bytes(blob)),
        codec.decoder.decode(Payload.from_bytes(blob)),
    )
    found["decoded_on"] = str(next(iter(ours.values())).device)
    error = sum(float((ours[n].cpu() - theirs[n]).square().sum()) for n in update)
    whole = sum(float(t.square().sum()) for t in theirs.values())
    found["decoded_error"] = error / whole
    return found


def main() -> int:
    """All fixed codecs and two subspaces."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    layers = 32 if device.type == "cuda" else 1
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    bad = 0
    for codec in (*UNTRAINED, *(c for c in CODECS if c.startswith("subspace"))):
        try:
            found = measure(codec, device, layers)
        except Exception:
            found, bad = {"error": traceback.format_exc()[-3000:]}, bad + 1
        config = {"device": name, "layers": layers}
        rows.append(args.out / f"{CASE}.jsonl", {**rows.stamp(CASE, codec, 0, config), **found})
        print(codec, found, flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
