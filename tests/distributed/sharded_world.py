"""Real gloo worlds for the tests of sharded training: one process per rank, many cases per world.

Processes are started as ``python sharded_cases.py``, so that nothing is pickled; results come back
as JSON, whose floats are exact.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CASES = Path(__file__).with_name("sharded_cases.py")
ROOT = Path(__file__).parents[2]

Results = dict[str, list[Any]]
"""Per case what each rank returned."""


def world(size: int, cases: Sequence[str], *, seconds: float = 110) -> Results:
    """Run the named cases of ``sharded_cases.py`` one after another in a world of ``size``."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(size):
            env = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(size),
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            }
            log = open(Path(folder) / f"log{rank}", "w")  # noqa: SIM115 - lives with the process
            command = [sys.executable, str(CASES), folder, str(seconds), *cases]
            processes.append(
                subprocess.Popen(
                    command, env=env, stdout=log, stderr=log, start_new_session=True, cwd=ROOT
                )
            )
            log.close()
        try:
            end = time.monotonic() + seconds
            # A rank that died leaves the others waiting for it.
            while time.monotonic() < end and all(p.poll() in (None, 0) for p in processes):
                if all(p.poll() == 0 for p in processes):
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        logs = [(Path(folder) / f"log{r}").read_text()[-3000:] for r in range(size)]
        codes = [p.returncode for p in processes]
        assert codes == [0] * size, f"exit codes {codes}\n" + "\n----\n".join(logs)
        parts = [json.loads((Path(folder) / f"out{r}.json").read_text()) for r in range(size)]
    return {name: [part[name] for part in parts] for name in cases}
