"""The script for a machine with a GPU, as far as a machine without one can run it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import rows

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_step_runs_and_leaves_its_rows(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "benchmarks/gpu/run.sh", "--dry-run", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    hooks = rows.read(tmp_path / "gpu-hooks.jsonl")
    checked = [row for row in hooks if row["config"]["mode"] != "timed"]
    assert {row["config"]["mode"] for row in checked} >= {"ddp", "ddp-compiled", "fsdp2"}
    assert all(row["equal_bits"] and row["learned"] for row in checked)
    adapters = rows.read(tmp_path / "gpu-adapter.jsonl")
    assert adapters
    assert all(row["same_bytes"] == 1 for row in adapters)
    assert len(rows.read(tmp_path / "gpu-tgap.jsonl")) == 1
