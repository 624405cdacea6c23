"""What compilers make of the kernels has not become worse; on any machine, in its own process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUDGET = ROOT / "benchmarks" / "kernels" / "aot_budget.json"

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton is not installed: any Linux machine with `pip install triton` runs it",
)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


SLOW = [pytest.param(t, marks=pytest.mark.slow) for t in ("sm_80", "sm_100", "gfx942")]


@needs_triton
@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", ["sm_90", *SLOW])
def test_kernels_stay_in_their_budget(target: str) -> None:
    done = run("-m", "benchmarks.kernels.aot_gate", "--targets", target)
    assert done.returncode == 0, done.stdout + done.stderr


COMPARE = """
import json
from benchmarks.kernels import aot_gate, variants
version = aot_gate.minor(aot_gate.triton.__version__)
budget = {version: {"sm_90": {"a": json.loads('%s')}}}
good = budget[version]["sm_90"]["a"]
def faults(**changes):
    return len(aot_gate.check({"sm_90": {"a": {**good, **changes}}}, budget))
print(json.dumps({
    "same": faults(),
    "slack": faults(registers=good["registers"] * 1.05),
    "registers": faults(registers=good["registers"] * 1.06),
    "instructions": faults(instructions=good["instructions"] * 1.06),
    "bytes": faults(bytes=good["bytes"] * 1.06),
    "spills": faults(spills=1),
    "narrow": faults(narrowest=good["narrowest"] // 2),
    "crash": faults(error="the compiler died"),
    "new": len(aot_gate.check({"sm_90": {"b": good}}, budget)),
    "version": len(aot_gate.check({"sm_90": {"a": good}}, {"1.0": {}})),
    "cases": sorted(variants.VARIANTS),
}))
"""


@needs_triton
def test_the_gate_sees_what_is_worse_and_the_benchmark_has_its_variants() -> None:
    by_version = json.loads(BUDGET.read_text())
    good = next(iter(next(iter(by_version.values()))["sm_90"].values()))
    done = run("-c", COMPARE % json.dumps(good))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("cases") == sorted(next(iter(by_version.values()))["sm_90"])
    assert found.pop("same") == found.pop("slack") == 0
    assert set(found.values()) == {1}, found


@needs_triton
def test_every_variant_of_the_gate_has_a_benchmark() -> None:
    script = (
        "from benchmarks.kernels import calls, variants\n"
        "print({*variants.VARIANTS} ^ {*calls.KERNELS})"
    )
    done = run("-c", script)
    assert done.stdout.strip() == "set()", done.stderr
