"""Bytes on TCP, losses and seconds of a Flower deployment, with and without ``CodecGrid``.

    python -m benchmarks.run flower [--quick]

A SuperLink and two SuperNodes on this machine run ``examples/flower_llama``: the embedded LLaMA
with LoRA, 98,304 values in 48 tensors. Nodes reach the SuperLink through a proxy that counts bytes,
requests and headers included. Seconds are those from ``flwr run`` to the end of the last round;
most of them go into starting a process for each message.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks import report, rows
from benchmarks.report import Page, Table, times
from benchmarks.run import ROOT, Options, check_names

CASE = "flower"
SCRIPT = ROOT / "examples" / "flower_llama" / "run.py"
REFERENCE = "fp32"

#: Codecs up and down, by scheme; empty: Flower alone.
SCHEMES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        REFERENCE: ("", "int4"),
        "int8": ("int8", "int8"),
        "int4": ("int4", "int4"),
        "sign-rotated": ("sign-rotated", "int4-rotated"),
    }
)


def main(options: Options) -> list[str]:
    """Run what has no row yet; print the table."""
    names = options.schemes or tuple(SCHEMES)[: 3 if options.quick else None]
    check_names(names, SCHEMES)
    rounds = options.rounds or (3 if options.quick else 8)
    path = options.out / f"{CASE}.jsonl"
    known = {row["run"] for row in rows.read(path)}
    for name in names:
        up, down = SCHEMES[name]
        config = {"rounds": rounds, "steps": 4, "nodes": 2, "up": up, "down": down}
        stamp = rows.stamp(CASE, name, 0, config)
        if stamp["run"] in known and not options.again:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = _example().run(up, down, rounds, 4, Path(folder))
        rows.append(path, {**stamp, **found})
        print(name, found, flush=True)
    made = page(path)
    print("no row of fp32 yet" if made is None else made.write(path))
    return []


def _example() -> Any:
    spec = importlib.util.spec_from_file_location("flower_llama_run", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(path: Path) -> Page | None:
    """The page of the rows with as many rounds as the longest run."""
    found = rows.read(path)
    longest = max((row["config"]["rounds"] for row in found), default=0)
    last = {row["scheme"]: row for row in found if row["config"]["rounds"] == longest}
    if REFERENCE not in last:
        return None
    reference = last[REFERENCE]
    made = report.Page("Flower, deployed on one machine", f"python -m benchmarks.run {CASE}")
    made.table("TCP bytes of two nodes, and held-out loss", _table(list(last.values()), reference))
    made.lines(
        [
            f"{longest} rounds; torch {reference['versions']['torch']}, {reference['machine']}; "
            f"loss before the first round {reference['losses'][0]:.4f}",
            "the first message to each node holds the whole model, in every scheme",
        ]
    )
    return made


def _table(found: Sequence[rows.Row], reference: rows.Row) -> Table:
    out: Table = [("scheme", "up", "down", "up ratio", "both ways", "loss", "seconds")]
    whole = reference["up"] + reference["down"]
    out += [
        (
            row["scheme"],
            f"{row['up']:,}",
            f"{row['down']:,}",
            times(reference["up"] / row["up"]),
            times(whole / (row["up"] + row["down"])),
            f"{row['losses'][-1]:.4f}",
            f"{row['seconds']:.0f}",
        )
        for row in found
    ]
    return out
