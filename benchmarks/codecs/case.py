"""Error, bits and speed of the codecs that need no fitting, beside what others offer.

    python -m benchmarks.run codecs --quick

1. Error: NMSE ``|y - x|^2 / |x|^2`` and cosine on gradients of the embedded LLaMA, on LoRA updates
   of clients and on Gaussian noise; bits a value as they cross the wire, scales included.
2. Positions of top-k: bits beside the entropy bound.
3. Speed on one core: encode and decode in GB of fp32 per second and as a ratio to a copy of the
   same run, with the C library and in torch.

Each part has a process of its own. Peers: ``pip install 'gradcodec[bench]' pypiquant``, and
epfml/powersgd from a clone in ``$GRADCODEC_PEERS``; what is missing is skipped with a line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from benchmarks import rows
from benchmarks.codecs import errors as codecs_errors
from benchmarks.codecs import speed as codecs_speed
from benchmarks.codecs.coders import SCHEMES
from benchmarks.codecs.page import page
from benchmarks.measure import apart
from benchmarks.run import Options, check_names

CASE = "codecs"


def main(options: Options) -> list[str]:
    """Measure, append rows, write ``codecs.md`` and ``codecs.png``; what failed, as text."""
    names = options.schemes or tuple(SCHEMES)
    check_names(names, SCHEMES)
    # Read by torch and OpenMP when a child imports them: all of it is one core's work.
    os.environ["OMP_NUM_THREADS"] = "1"
    count, numel, rounds = (1, 1 << 22, 3) if options.quick else (4, 1 << 24, 15)
    without_memory = tuple(name for name in names if not SCHEMES[name].feedback)
    parts: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
        "error": (codecs_errors.measure, (without_memory, count), {"snapshots": count}),
        "positions": (codecs_errors.positions, (1 << 22,), {"values": 1 << 22}),
        "speed": (codecs_speed.measure, (names, numel, rounds), {"values": numel}),
    }
    path = options.out / f"{CASE}.jsonl"
    skipped: list[str] = []
    for part, (function, arguments, config) in parts.items():
        load = round(os.getloadavg()[0], 2)
        found, missing = apart(function, *arguments)
        skipped += [line for line in missing if line not in skipped]
        for row in found:
            asked = {"part": part, **config, "rounds": rounds, "impl": row.get("impl", "")}
            stamped = rows.stamp(CASE, row["scheme"], 0, asked)
            known = SCHEMES.get(row["scheme"])
            peer = {"package": f"{known.package} {known.version}"} if known else {}
            rows.append(path, {**stamped, **peer, "load": load, **row})
        print(f"{part}: {len(found)} rows", flush=True)
    for line in skipped:
        print(f"skipped: {line}")
    print(page(path).write(path))
    return []
