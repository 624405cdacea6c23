"""Rows of a benchmark on disk: JSON lines, appended one by one, so that a crash loses none.

A *run* is one scheme with one seed and one learning rate; its rows share the id ``run``, a digest
of everything that was asked for. A run that was broken off starts again from its first round; its
rows up to then are superseded by the later ones (``runs``), nothing is ever rewritten.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradcodec.recipes.results import run_versions

Row = dict[str, Any]

_VERSIONS = ("python", "gradcodec", "torch", "numpy", "transformers", "peft")


def stamp(case: str, scheme: str, seed: int, config: Mapping[str, Any]) -> Row:
    """What every row of a run says of where it comes from.

    Args:
        case: of the benchmark.
        scheme: what was run.
        seed: of the world.
        config: short, plain JSON values; runs of another config are other runs.
    """
    asked = {"case": case, "scheme": scheme, "seed": seed, "config": dict(config)}
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    return {"run": digest[:10], **asked, **_where()}


@functools.cache
def _where() -> Row:
    versions = run_versions()
    return {
        "versions": {n: versions[n] for n in _VERSIONS if versions.get(n)},
        "commit": versions["commit"],
        "machine": f"{versions['machine']}, {os.cpu_count()} cores",
    }


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Add one row; processes may do so side by side, since each row is one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row) + "\n"
    with path.open("ab", buffering=0) as file:
        if file.tell() and not _ends_a_line(path):
            line = "\n" + line  # what a crash cut off stays a line of its own, and is skipped
        file.write(line.encode())


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def read(path: Path) -> list[Row]:
    """All whole rows of a file, none if there is no file."""
    out: list[Row] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            out.append(json.loads(line))
        except ValueError:
            continue  # cut off by a crash; its run starts again
    return out


def runs(path: Path) -> dict[str, list[Row]]:
    """The rows of each run's last attempt, by its id, in the order of rounds."""
    out: dict[str, list[Row]] = {}
    for row in read(path):
        if row["round"] == 1:
            out[row["run"]] = []
        out.setdefault(row["run"], []).append(row)
    return out


def finished(rows: list[Row]) -> bool:
    """Whether a run came to its end, a good one or not."""
    return bool(rows) and (
        rows[-1]["diverged"] or rows[-1]["round"] == rows[-1]["config"]["rounds"]
    )
