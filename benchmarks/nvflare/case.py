"""Bytes and losses of a federation in NVFLARE's simulator, with our filters and with its own.

    python -m benchmarks.run nvflare

Two sites train 96 LoRA tensors (540,672 parameters) in 10 rounds of ``FedAvgRecipe``. Bytes are
those that NVFLARE's own statistics count at the server, requests and headers included. Rows:
``results/nvflare.jsonl``, one per scheme and seed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import rows
from benchmarks.nvflare import page
from benchmarks.nvflare.schemes import SCHEMES, Scheme
from benchmarks.nvflare.work import SITES
from benchmarks.run import ROOT, Options, choose

CASE = "nvflare"
ROUNDS, LAYERS, SEED = 10, 24, 0
TIMEOUT = 900


def main(options: Options) -> list[str]:
    """Run what is not finished, a job at a time; append its row; what failed, as text."""
    path = options.out / f"{CASE}.jsonl"
    known = {row["run"] for row in rows.read(path)}
    failed = []
    for seed in options.seeds or (SEED,):
        for scheme in choose(SCHEMES, options, "fp32"):
            config = {"rounds": options.rounds or ROUNDS, "layers": LAYERS, "sites": SITES}
            stamp = rows.stamp(CASE, scheme.name, seed, config)
            if stamp["run"] in known and not options.again:
                continue
            stamp["versions"] = {**stamp["versions"], "nvflare": _version("nvflare")}
            try:
                found = measure(scheme, seed, config["rounds"], LAYERS)
            except (OSError, RuntimeError, subprocess.TimeoutExpired) as err:
                failed.append(f"{scheme.name}, seed {seed}: {err}")
                continue
            rows.append(path, {**stamp, **found})
            up, down = found["uplink_bytes"], found["downlink_bytes"]
            print(f"{scheme.name:20} {up:12,} up {down:12,} down, loss {found['losses'][-1]:.4f}")
    if rows.read(path):
        print(page.page(path).write(path))
    return failed


def measure(scheme: Scheme, seed: int, rounds: int, layers: int) -> dict[str, Any]:
    """Run one job in processes of its own; returns its line.

    Raises:
        RuntimeError: the job failed; the text ends with what it printed last.
        TimeoutExpired: it took too long.
    """
    size = ["--rounds", str(rounds), "--layers", str(layers), "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as folder:
        line, _ = run_module(["benchmarks.nvflare.job", scheme.name, f"{folder}/run", *size])
    return line


def run_module(command: list[str]) -> tuple[dict[str, Any], str]:
    """Run a module that runs a job, in a new process; returns its last line and its log.

    Raises:
        RuntimeError, TimeoutExpired: as ``measure``; no process of the job is left then.
    """
    paths = (ROOT, ROOT / "kernels", ROOT / "tests")
    job = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # the simulator starts processes of its own
    )
    try:
        out, log = job.communicate(timeout=TIMEOUT)
    except BaseException:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
        raise
    lines = out.splitlines()
    if job.returncode or not lines:
        raise RuntimeError("\n".join([*lines[-5:], *log.splitlines()[-5:]]))
    return json.loads(lines[-1]), out + log


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
