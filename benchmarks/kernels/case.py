"""How fast the kernels are, as a fraction of what a copy on the same device moves.

    python -m benchmarks.run kernels [--quick] [--schemes encode,topk]

1. The kernels' own tests, on the device (``-m gpu``). A kernel whose tests are not green is not
   timed.
2. The bandwidth of a device-to-device copy, bytes read and written.
3. Every kernel at 2**28 values (2**22 with ``--quick``, which fit a cache) of random data, and
   beside them what torch, bitsandbytes, torchao and torchft do, where they are installed. ``of
   copy`` is the bytes that must move, over the time, over the bandwidth of 2.

Without a CUDA device nothing is timed: rows say ``"measured": false``, and hold what ``aot_gate``
computes from compiled binaries. The page (``benchmarks.kernels.page``) is made of both.
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import report, rows
from benchmarks.kernels import page as pages
from benchmarks.run import ROOT, Options
from gradcodec.errors import ConfigError

CASE = "kernels"
NUMEL, QUICK = 1 << 28, 1 << 22
#: What is computed where there is no device.
TARGET = "sm_90"


def main(options: Options) -> list[str]:
    """Measure or compute, append a row each, print the table, draw the roofline."""
    try:
        from benchmarks.kernels.variants import VARIANTS
    except ImportError as error:
        raise ConfigError(f"the kernels need triton: pip install triton ({error})") from error
    names = [
        name
        for name in VARIANTS
        if options.schemes is None or any(part in name for part in options.schemes)
    ]
    if not names:
        raise ConfigError(f"no kernel has any of {options.schemes} in its name")
    if not torch.cuda.is_available():
        return _computed(options, names)
    red = _red(options.workers, options.out)
    bad = [
        f"{CASE}: tests/kernels/on_device/{file} is not green, its kernel is not timed"
        for file in red
    ]
    green = [name for name in names if f"test_{_op(name)}.py" not in red]
    return bad + _measured(options, green)


def triton_version() -> str:
    """Of the installed Triton, which is not imported before it is needed."""
    return version("triton")


# -- without a device ----------------------------------------------------------------------------


def _computed(options: Options, names: Sequence[str]) -> list[str]:
    from benchmarks.kernels import aot_gate
    from benchmarks.kernels.variants import VARIANTS

    print(
        "No CUDA device was there: nothing below was measured. Instructions are counted in "
        f"binaries compiled for {TARGET}, and roofs computed from them for an H200."
    )
    found = aot_gate.survey([TARGET], names, options.workers)[TARGET]
    table, bad = [], []
    for name in names:
        if "error" in found[name]:
            bad.append(f"{CASE}: {name}: {found[name]['error']}")
            continue
        memory, issue = aot_gate.roofs(VARIANTS[name], found[name])
        config = {"target": TARGET, "triton": triton_version()}
        table.append(
            {
                **rows.stamp(CASE, name, 0, config),
                "measured": False,
                "moved_bytes": round(VARIANTS[name].moved, 4),
                **found[name],
                "roof_memory_gel_s": round(memory, 1),
                "roof_issue_gel_s": None if issue is None else round(issue, 1),
            }
        )
        rows.append(options.out / f"{CASE}.jsonl", table[-1])
    print(aot_gate.table({TARGET: {name: found[name] for name in names}}))
    return bad


# -- with one ------------------------------------------------------------------------------------


def _op(name: str) -> str:
    """The kernel that a case times: the first word of its name."""
    return name.replace(",", " ").split()[0]


def _red(workers: int, out: Path) -> list[str]:
    """The files of the kernels' tests that are not green on the device.

    Raises:
        ConfigError: the tests did not run at all.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rfE", "--tb=short"]
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    command += ["-p", "no:cacheprovider", "tests/kernels/on_device"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernel-tests.log").write_text(done.stdout + done.stderr)
    lines = done.stdout.strip().splitlines()
    print("\n".join(lines[-30:]), flush=True)
    red = {
        Path(line.split()[1].partition("::")[0]).name
        for line in lines
        if line.startswith(("FAILED ", "ERROR "))
    }
    if done.returncode not in (0, 1) or (done.returncode and not red):
        raise ConfigError(
            f"the kernels' tests did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return sorted(red)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of 2 GiB."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source))


def _seconds(call: Any) -> float:
    """Median of a call, from a cold cache each time."""
    import triton.testing

    call()  # compiles
    torch.cuda.synchronize()
    times: list[float] = triton.testing.do_bench(call, warmup=50, rep=300, return_mode="all")
    return statistics.median(times) / 1e3


def _measured(options: Options, names: Sequence[str]) -> list[str]:
    from benchmarks.kernels import calls

    device = torch.device("cuda")
    numel = QUICK if options.quick else NUMEL
    properties = torch.cuda.get_device_properties(device)
    bandwidth = copy_bandwidth(device)
    print(f"{properties.name}: a copy moves {bandwidth / 1e12:.2f} TB/s")
    wanted = {name: calls.KERNELS[name] for name in names}
    if options.schemes is None:
        wanted |= calls.PEERS
    table: list[rows.Row] = []
    bad = []
    config = {
        "numel": numel,
        "device": properties.name,
        "triton": triton_version(),
        "copy_gb_s": round(bandwidth / 1e9, 1),
    }
    for name, make in wanted.items():
        torch.manual_seed(0)
        try:
            call, moved = make(numel, device)
            seconds = _seconds(call)
        except ImportError as error:
            print(f"{name}: not installed ({error})")
            continue
        except Exception as error:  # one that does not fit or run leaves the others
            bad.append(f"{CASE}: {name}: {type(error).__name__}: {error}")
            continue
        finally:
            torch.cuda.empty_cache()
        table.append(
            {
                **rows.stamp(CASE, name, 0, config),
                "measured": True,
                "ms": round(seconds * 1e3, 4),
                "moved_bytes": round(moved / numel, 4),
                "gel_s": round(numel / seconds / 1e9, 2),
                "gb_s": round(moved / seconds / 1e9, 1),
                "of_copy": round(moved / seconds / bandwidth, 4),
            }
        )
        rows.append(options.out / f"{CASE}.jsonl", table[-1])
    print(report.aligned(pages.speeds(table)))
    made = page(options.out / f"{CASE}.jsonl")
    if made is not None:
        made.write(options.out / f"{CASE}.jsonl")
    return bad


def page(path: Path) -> report.Page | None:
    """The page of this case's rows."""
    return pages.page(path)
