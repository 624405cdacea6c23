"""Real gloo processes for tests: one world runs many case functions, one after the other.

Starting a process costs seconds, a case fractions of one. A case is a function ``(rank, world)``
that fails by raising. After a failure on any rank the world is left (the other ranks would wait for
it), and cases that did not run say so.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest

GROUP_TIMEOUT = 60
PASSED = "passed"


def run_world(
    module: str,
    cases: list[str],
    world: int,
    limit: float = 110,
    group_timeout: float = GROUP_TIMEOUT,
) -> dict[str, list[str]]:
    """Outcome of every case at every rank: ``"passed"``, a traceback, or why it did not run."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(p for p in sys.path if p)
        env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path, GLOO_SOCKET_IFNAME="lo")
        outputs = [Path(folder, f"{rank}.log") for rank in range(world)]
        processes = []
        for rank in range(world):
            command = [sys.executable, "-m", "distributed.world", module, str(rank), str(world)]
            command += [folder, str(group_timeout), *cases]
            with outputs[rank].open("wb") as log:
                processes.append(
                    subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
                )
        end = time.monotonic() + limit
        try:
            for process in processes:
                process.wait(max(0.1, end - time.monotonic()))
            ended = ["exit code " + str(p.returncode) for p in processes]
        except subprocess.TimeoutExpired:
            ended = [f"still running after {limit} s" for _ in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        found: dict[str, list[str]] = {case: [] for case in cases}
        for rank in range(world):
            result = Path(folder, f"{rank}.json")
            told = json.loads(result.read_text()) if result.exists() else {}
            tail = outputs[rank].read_text(errors="replace")[-2000:]
            for case in cases:
                silent = f"rank {rank} did not get here: {ended[rank]}\n{tail}"
                found[case].append(told.get(case, silent))
        return found


def check(outcome: list[str]) -> None:
    """Fail the running test with what went wrong, by rank; pass if every rank did."""
    bad = [f"rank {r}: {text}" for r, text in enumerate(outcome) if text != PASSED]
    if bad:
        pytest.fail("\n".join(bad), pytrace=False)


def _rank_main() -> None:
    module, rank_text, world_text, folder, timeout, *cases = sys.argv[1:]
    rank, world = int(rank_text), int(world_text)
    import torch
    import torch.distributed as dist
    from conftest import _poisoned

    torch.set_num_threads(1)
    torch.empty = _poisoned(torch.empty)
    torch.empty_like = _poisoned(torch.empty_like)
    functions = importlib.import_module(module)
    told: dict[str, str] = {}
    result = Path(folder, f"{rank}.json")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(os.path.join(folder, "store"), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=float(timeout)),
    )
    for case in cases:
        torch.manual_seed(0)
        start = time.monotonic()
        try:
            getattr(functions, case)(rank, world)
            told[case] = PASSED
        # Also what is no Exception: whatever it is belongs into the report.
        except BaseException:
            told[case] = traceback.format_exc()
        result.write_text(json.dumps(told))
        sys.stdout.write(f"{case}: {time.monotonic() - start:.2f} s\n")
        sys.stdout.flush()
        if told[case] != PASSED:
            os._exit(1)
        if dist.is_initialized():
            dist.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    _rank_main()
