"""Programs in so many processes on this machine, ended with all their children if they hang."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

_GRACE = 10.0
"""Seconds that ranks have to end by themselves when another one has failed."""


def launched(
    program: Path, *arguments: str, ranks: int = 2, torchrun: bool = True, limit: int = 110
) -> subprocess.CompletedProcess[str]:
    """Run a program, by torchrun or as one that starts its ranks itself."""
    command = [sys.executable]
    if torchrun:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(program), *arguments]
    process = subprocess.Popen(
        command,
        env=_environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # ranks are children of the launcher
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"still running after {limit} s\n{out}\n{err[-3000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def two_ranks(program: Path, *arguments: str, limit: int = 110) -> tuple[bool, str]:
    """Run both ranks of a program as torchrun would, but without its process, which loads torch.

    Returns:
        Whether both ended well, and what they printed, one after the other.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{rank}.log") for rank in range(2)]
        started = []
        for rank, path in enumerate(logs):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
            place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "tests"}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with path.open("wb") as log:
                started.append(
                    subprocess.Popen(
                        [sys.executable, str(program), *arguments],
                        env=_environment() | place,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        end = time.monotonic() + limit
        failed = False
        while (running := [p for p in started if p.poll() is None]) and time.monotonic() < end:
            if not failed and any(p.returncode for p in started):
                failed, end = True, min(end, time.monotonic() + _GRACE)
            time.sleep(0.05)
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = "\n".join(path.read_text(errors="replace") for path in logs)
        if running and not failed:
            pytest.fail(f"still running after {limit} s\n{said[-6000:]}")
    return not any(p.returncode for p in started), said


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
