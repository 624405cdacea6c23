"""A process of ``LocalSteps`` is killed; the others go on with a new one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PROGRAM = TESTS / "distributed" / "killed_rank.py"


def start(role: str, folder: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), role, str(folder)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
def test_a_killed_rank_is_replaced(tmp_path: Path) -> None:
    ranks = [start(role, tmp_path) for role in ("0", "1", "2")]
    try:
        assert ranks[2].wait(60) == -signal.SIGKILL
        ranks[2] = start("new", tmp_path)
        end = time.monotonic() + 50  # less than the groups' timeout: the death itself is noticed
        said = [rank.communicate(timeout=end - time.monotonic())[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0, 0], "\n".join(said)
    assert all("another rank has died" in text for text in said[:2])
