"""The kernels against their oracles, in Triton's interpreter: on any machine, in its own process.

Whether kernels are interpreted is decided when triton is first imported, for the whole process, so
``tests/kernels/on_device`` is collected only where ``TRITON_INTERPRET=1`` was set before, as it is
here, or where there is a CUDA device; there its tests are marked ``gpu``.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).with_name("on_device")


@pytest.mark.slow
@pytest.mark.parametrize("third", [0, 1, 2])
def test_kernels_equal_their_oracles_in_the_interpreter(third: int) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: any Linux machine with `pip install triton` runs it")
    files = sorted(FOLDER.glob("test_*.py"))[third::3]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", *files],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.gpu
def test_the_device_is_there() -> None:
    """Says in a run of ``-m gpu`` why the kernels were not tested."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; its tests are those of tests/kernels/on_device")
