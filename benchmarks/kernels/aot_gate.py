"""The kernels' binaries, compiled on a machine without a GPU, compared with their budget.

    python -m benchmarks.kernels.aot_gate [--targets sm_90,gfx942] [--only encode] [--write]

Every variant is compiled ahead of time for every target and its binary read: registers, spills,
shared memory, bytes and instructions per element, and how narrow an access to memory there is.
``aot_budget.json`` holds what was found when the kernels were last changed, for each minor version
of Triton; anything more than 5 % over it fails, and any spill. ``--write`` replaces the budget of
the installed version.

Instructions per element are those of a warp's lanes: counted in the binary, times threads, over the
elements of a program. That is exact for straight-line code, but for the loops in which Blackwell
waits for its products; of a kernel with a loop, marked ``*``, it is one turn. ``roof`` is what an
H200 could do at most, in 1e9 elements per second, by bytes that must move and by instructions that
must issue. It is computed, nothing here is a measurement.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise SystemExit("the interpreter compiles nothing: unset TRITON_INTERPRET")

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.kernels import binaries
from benchmarks.kernels.binaries import Found
from benchmarks.kernels.variants import VARIANTS, Variant, variants
from gradcodec_kernels import launch

BUDGET = Path(__file__).with_name("aot_budget.json")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SLACK = 1.05

#: An H200: measured copy bandwidth, bytes read and written; multiprocessors, lanes that issue in a
#: clock, clocks in a second.
BANDWIDTH = 4.3e12
ISSUE = 132 * 128 * 1.75e9

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def compiled(name: str, target: str) -> Found:
    """Compile one variant for one target and read its binary."""
    variant = VARIANTS[name]
    amd = target.startswith("gfx")
    arch: int | str = target if amd else int(target.removeprefix("sm_"))
    gpu = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", arch, 32)
    warps = launch.warps(variant.op, arch, _DTYPES[variant.dtype], variant.bits)
    binary = triton.compile(
        variant.source(),
        target=gpu,
        options={"num_warps": warps, "enable_fp_fusion": False},
    )
    lanes = warps * gpu.warp_size / variant.elements
    read = binaries.read_amd if amd else binaries.read_nvidia
    found = read(binary)
    widths = found.pop("widths")
    return {
        **found,
        "bytes": round(sum(width * n for width, n in widths.items()) * lanes, 3),
        "instructions": round(found["instructions"] * lanes, 2),
        "narrow": sum(n for width, n in widths.items() if width < 16),
        "narrowest": 8 * min(widths),
    }


def roofs(variant: Variant, found: Found) -> tuple[float, float | None]:
    """1e9 elements per second that an H200 can move, and that it can issue instructions for.

    The second is unknown where there is a loop, since only one turn of it was counted.
    """
    issue = ISSUE / found["instructions"] / 1e9 if variant.straight else None
    return BANDWIDTH / variant.moved / 1e9, issue


def minor(version: str) -> str:
    """``3.9`` of ``3.9.0``."""
    return ".".join(version.split(".")[:2])


def over(found: Found, allowed: Found | None) -> list[str]:
    """What of a variant is worse than its budget allows."""
    bad = [f"{found['spills']} spilled bytes or accesses"] if found["spills"] else []
    if allowed is None:
        return [*bad, "is in no budget; add it with --write"]
    for name in ("registers", "shared", "bytes", "instructions", "narrow"):
        if found[name] > allowed[name] * SLACK:
            bad.append(f"{name} {found[name]} > {allowed[name]}")
    if found["narrowest"] < allowed["narrowest"]:
        bad.append(f"accesses of {found['narrowest']} bits, {allowed['narrowest']} before")
    return bad


def survey(
    targets: Sequence[str] = TARGETS, names: Collection[str] = VARIANTS, workers: int = 2
) -> dict[str, dict[str, Found]]:
    """What was found for each target and variant of these names."""
    pairs = [(name, target) for target in targets for name in variants(target) if name in names]
    out: dict[str, dict[str, Found]] = {target: {} for target in targets}
    with (
        tempfile.TemporaryDirectory() as cache,
        ProcessPoolExecutor(
            workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_cache,
            initargs=(cache,),
        ) as pool,
    ):
        for (name, target), found in zip(pairs, pool.map(_safely, pairs), strict=True):
            out[target][name] = found
    return out


def _cache(folder: str) -> None:
    """Compile afresh, and leave nothing behind."""
    triton.knobs.cache.dir = folder
    os.environ["TRITON_CACHE_DIR"] = folder


def _safely(pair: tuple[str, str]) -> Found:
    try:
        return compiled(*pair)
    except Exception as error:  # a compiler's crash is a finding
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def table(found: Mapping[str, Mapping[str, Found]]) -> str:
    """Rows as text, a table for each target."""
    lines = [f"Triton {triton.__version__}, ahead of time; * has a loop, of which one turn counts"]
    for target, rows in found.items():
        roofed = target == "sm_90"
        lines += [
            f"\n| {target} | registers | spills | shared | moved B | accessed B | instructions "
            f"| narrowest |" + (" roof: memory | issue |" if roofed else ""),
            "|---|---|---|---|---|---|---|---|" + ("---|---|" if roofed else ""),
        ]
        for name, row in rows.items():
            if "error" in row:
                lines.append(f"| {name} | {row['error']} |")
                continue
            variant = VARIANTS[name]
            turn = "" if variant.straight else "*"
            line = (
                f"| {name} | {row['registers']} | {row['spills']} | {row['shared']} "
                f"| {variant.moved:.2f} | {row['bytes']:.2f} "
                f"| {row['instructions']:.1f}{turn} | {row['narrowest']} |"
            )
            if roofed:
                memory, issue = roofs(variant, row)
                line += f" {memory:.0f} | {'?' if issue is None else f'{issue:.0f}'} |"
            lines.append(line)
    return "\n".join(lines)


def check(found: Mapping[str, Mapping[str, Found]], budget: Mapping[str, Any]) -> list[str]:
    """What failed, as lines of text."""
    version = minor(triton.__version__)
    if version not in budget:
        return [
            f"no budget for Triton {version}, there are {sorted(budget)}: run "
            "`python -m benchmarks.kernels.aot_gate --write` with this version and commit "
            "aot_budget.json"
        ]
    bad = []
    for target, rows in found.items():
        allowed = budget[version].get(target, {})
        for name, row in rows.items():
            faults = [row["error"]] if "error" in row else over(row, allowed.get(name))
            bad += [f"{target}, {name}: {fault}" for fault in faults]
    return bad


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print the table, compare with the budget; 1 if anything is over it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.aot_gate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help="of " + ", ".join(TARGETS))
    parser.add_argument("--only", default="", help="variants whose name has this")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    parser.add_argument("--write", action="store_true", help="make this the version's budget")
    args = parser.parse_args(argv)
    names = [name for name in VARIANTS if args.only in name]
    found = survey(args.targets.split(","), names, args.workers)
    print(table(found))
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    version = minor(triton.__version__)
    if args.write:
        of_version = budget.setdefault(version, {})
        for target, rows in found.items():
            kept = {} if not args.only else of_version.get(target, {})
            of_version[target] = {**kept, **{n: r for n, r in rows.items() if "error" not in r}}
        BUDGET.write_text(json.dumps(budget, indent=1, sort_keys=True) + "\n")
    bad = check(found, budget)
    if bad:
        print("failed:\n  " + "\n  ".join(bad), file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
