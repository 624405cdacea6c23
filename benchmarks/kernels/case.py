"""How fast the kernels are, as a fraction of what a copy on the same device moves.

    python -m benchmarks.run kernels [--quick] [--schemes encode,topk]

1. The kernels' own tests, on the device (``-m gpu``). Unless they are green no speed is quoted.
2. The bandwidth of a device-to-device copy, bytes read and written.
3. Every kernel at 2**28 values (2**22 with ``--quick``, which fit a cache) of random data, and
   beside them what torch, bitsandbytes, torchao and torchft do, where they are installed. ``of
   copy`` is the bytes that must move, over the time, over the bandwidth of 2.
4. The roofline: instructions per byte from ``aot_gate``, for the device's architecture.

Without a CUDA device nothing is timed: rows say ``"measured": false``, and table and plot are what
``aot_gate`` computes for an H200 from compiled binaries.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import report, rows
from benchmarks.run import ROOT, Options
from gradcodec.errors import ConfigError

CASE = "kernels"
NUMEL, QUICK = 1 << 28, 1 << 22
#: What plot and table are computed for where there is no device.
TARGET = "sm_90"


def main(options: Options) -> list[str]:
    """Measure or compute, append a row each, print the table, draw the roofline."""
    try:
        from benchmarks.kernels import aot_gate
    except ImportError as error:
        raise ConfigError(f"the kernels need triton: pip install triton ({error})") from error
    names = [
        name
        for name in aot_gate.VARIANTS
        if options.schemes is None or any(part in name for part in options.schemes)
    ]
    if not names:
        raise ConfigError(f"no kernel has any of {options.schemes} in its name")
    if not torch.cuda.is_available():
        return _computed(options, names)
    failed = _tests()
    if failed:
        print(failed)
        return [f"{CASE}: the kernels' tests are not green on this device, so nothing was timed"]
    return _measured(options, names)


def triton_version() -> str:
    """Of the installed Triton, which is not imported before it is needed."""
    return version("triton")


# -- without a device ----------------------------------------------------------------------------


def _computed(options: Options, names: Sequence[str]) -> list[str]:
    from benchmarks.kernels import aot_gate

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
        memory, issue = aot_gate.roofs(aot_gate.VARIANTS[name], found[name])
        config = {"target": TARGET, "triton": triton_version()}
        table.append(
            {
                **rows.stamp(CASE, name, 0, config),
                "measured": False,
                "moved_bytes": round(aot_gate.VARIANTS[name].moved, 4),
                **found[name],
                "roof_memory_gel_s": round(memory, 1),
                "roof_issue_gel_s": None if issue is None else round(issue, 1),
            }
        )
        rows.append(options.out / f"{CASE}.jsonl", table[-1])
    print(aot_gate.table({TARGET: {name: found[name] for name in names}}))
    lines = {
        row["scheme"]: (
            row["instructions"] / row["moved_bytes"],
            min(row["roof_memory_gel_s"], row["roof_issue_gel_s"]) * row["moved_bytes"],
        )
        for row in table
        if row["roof_issue_gel_s"] is not None
    }
    bandwidth, issue = aot_gate.BANDWIDTH / 1e9, aot_gate.ISSUE / 1e9
    title = "computed for an H200, nothing measured"
    _plot(lines, bandwidth, issue, title, False, options.out / f"{CASE}.png")
    return bad


# -- with one ------------------------------------------------------------------------------------


def _tests() -> str:
    """Output of the kernels' tests on the device if they are not green, else nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels/on_device"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "")
    return "" if done.returncode == 0 else done.stdout[-5000:] + done.stderr[-2000:]


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
    print(_speeds(table))
    _roofline(options, table, bandwidth, device)
    return bad


def _speeds(table: Sequence[rows.Row]) -> str:
    lines = [
        "| kernel | ms | bytes per value | 1e9 values/s | GB/s | of copy |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['scheme']} | {row['ms']:.3f} | {row['moved_bytes']:.2f} | {row['gel_s']:.0f} "
        f"| {row['gb_s']:.0f} | {row['of_copy']:.1%} |"
        for row in table
    ]
    return "\n".join(lines)


def _roofline(
    options: Options, table: Sequence[rows.Row], bandwidth: float, device: torch.device
) -> None:
    """Where the device's own binaries stand, if its architecture is one that the gate reads."""
    from benchmarks.kernels import aot_gate
    from gradcodec_kernels.launch import architecture

    arch = architecture(device)
    target = str(arch) if isinstance(arch, str) else f"sm_{arch}"
    names = {row["scheme"] for row in table}
    names = {name for name, v in aot_gate.VARIANTS.items() if v.straight and name in names}
    found = aot_gate.survey([target], names, options.workers)[target]
    lines = {
        row["scheme"]: (found[row["scheme"]]["instructions"] / row["moved_bytes"], row["gb_s"])
        for row in table
        if row["scheme"] in names and "error" not in found.get(row["scheme"], {"error": ""})
    }
    properties = torch.cuda.get_device_properties(device)
    clock = getattr(properties, "clock_rate", 1.75e6) * 1e3
    issue = properties.multi_processor_count * 128 * clock / 1e9
    title = f"{properties.name}, measured"
    _plot(lines, bandwidth / 1e9, issue, title, True, options.out / f"{CASE}.png")


# -- the plot ------------------------------------------------------------------------------------


def _plot(
    points: Mapping[str, tuple[float, float]],
    bandwidth: float,
    issue: float,
    title: str,
    measured: bool,
    path: Path,
) -> None:
    """GB/s against instructions per byte, under the two roofs; hollow if nothing was measured."""
    figure, axes = report.figure(figsize=(9, 5.5))
    knee = issue / bandwidth
    xs = [1, knee, 128]
    axes.plot(xs, [min(bandwidth, issue / x) for x in xs], color="black", linewidth=1)
    groups = sorted({name.partition(" ")[0].rstrip(",") for name in points})
    for i, group in enumerate(groups):
        mine = [p for name, p in points.items() if name.startswith(group)]
        colour = f"C{i}"
        axes.scatter(
            [x for x, _ in mine],
            [y for _, y in mine],
            label=group,
            edgecolors=colour,
            facecolors=colour if measured else "none",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("instructions per byte that must move")
    axes.set_ylabel("GB/s" if measured else "GB/s at most")
    axes.set_title(title)
    axes.legend(frameon=False, fontsize=8)
    report.save(figure, path)
