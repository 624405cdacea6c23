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
import collections
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise SystemExit("the interpreter compiles nothing: unset TRITON_INTERPRET")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradcodec_kernels import launch, topk_encode
from gradcodec_kernels.decode_mean import decode_mean_kernel
from gradcodec_kernels.encode import encode_kernel
from gradcodec_kernels.lloyd_encode import lloyd_encode_kernel
from gradcodec_kernels.lloyd_mean import lloyd_mean_kernel
from gradcodec_kernels.rotsign_encode import rotsign_encode_kernel
from gradcodec_kernels.rotsign_mean import rotsign_mean_kernel
from gradcodec_kernels.sparse_mean import sparse_mean_kernel
from gradcodec_kernels.top_rows import top_rows_kernel

BUDGET = Path(__file__).with_name("aot_budget.json")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SLACK = 1.05

#: An H200: measured copy bandwidth, bytes read and written; multiprocessors, lanes that issue in a
#: clock, clocks in a second.
BANDWIDTH = 4.3e12
ISSUE = 132 * 128 * 1.75e9

Found = dict[str, Any]

_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BF16 = {"LEFT": "bf16", "RIGHT": "bf16", "S": "bf16", "SCALES": "bf16"}


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched for one use.

    Attributes:
        op: its name in ``launch.WARPS``.
        kernel: the jitted function.
        pointers: element type of each pointer argument.
        constants: its ``constexpr`` arguments.
        moved: bytes per element that must be read or written.
        dtype: of the values, for the settings of the launch.
        bits: of the codes, likewise.
        elements: of a program.
        straight: no loop, so that instructions in the binary are instructions executed.
    """

    op: str
    kernel: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    moved: float
    dtype: str = "fp32"
    bits: int | None = None
    elements: int = launch.CHUNK
    straight: bool = True

    def source(self) -> ASTSource:
        """Arguments as the launcher gives them: aligned pointers, strides that divide by 16."""
        signature, attributes = {}, {}
        for i, p in enumerate(self.kernel.params):
            if p.name in self.constants:
                signature[p.name] = "constexpr"
                continue
            pointer = self.pointers.get(p.name)
            scalar = "fp32" if p.name in ("before", "after") else "i32"
            signature[p.name] = f"*{pointer}" if pointer else scalar
            if pointer or not (p.do_not_specialize or scalar == "fp32"):
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs=dict(self.constants),
            attrs=attributes,
        )


def _encode(
    bits: int,
    dtype: str = "bf16",
    *,
    block: int = 4096,
    scale: str = "absmax",
    rotate: bool = False,
    stochastic: bool = False,
    ef: bool = False,
    even: bool = True,
) -> Variant:
    constants = {
        "BITS": bits,
        "BLOCK": block,
        "SCALE": scale,
        "ROTATE": rotate,
        "STOCHASTIC": stochastic,
        "EF": ef,
        "EVEN": even,
    }
    moved = _SIZES[dtype] * (3 if ef else 1) + bits / 8 + 2 / block
    pointers = {"X": dtype, "E": dtype, "P": "u8", **_BF16}
    return Variant("encode", encode_kernel, pointers, constants, moved, dtype, bits)


def _decode(
    world: int,
    bits: int,
    out: str = "bf16",
    *,
    block: int = 4096,
    rotate: bool = False,
    weighted: bool = False,
    words: str = "i32",
) -> Variant:
    constants = {
        "W": world,
        "BITS": bits,
        "BLOCK": block,
        "ROTATE": rotate,
        "WEIGHTED": weighted,
        "EVEN": True,
    }
    pointers = {"P": words, "WEIGHTS": "fp32" if weighted else "bf16", "OUT": out, **_BF16}
    moved = world * (bits / 8 + 2 / block) + _SIZES[out]
    kernel, straight = decode_mean_kernel, world <= 16
    return Variant("decode_mean", kernel, pointers, constants, moved, out, bits, straight=straight)


def _levels(*, ef: bool) -> Variant:
    constants = {"BLOCK": 256, "EF": ef, "EVEN": True}
    moved = 4 * (3 if ef else 1) + 2 / 8 + 4 / 256
    pointers = {"X": "fp32", "E": "fp32", "P": "u8", "S": "bf16"}
    return Variant("lloyd_encode", lloyd_encode_kernel, pointers, constants, moved, bits=2)


def _mean_of_levels(world: int) -> Variant:
    constants = {"BLOCK": 256, "WEIGHTED": False, "EVEN": True}
    moved = world * (2 / 8 + 4 / 256) + 4
    pointers = {"P": "u8", "S": "bf16", "WEIGHTS": "bf16", "OUT": "fp32"}
    kernel = lloyd_mean_kernel
    return Variant("lloyd_mean", kernel, pointers, constants, moved, bits=2, straight=False)


def _signs(kept: int, *, ef: bool) -> Variant:
    constants = {"BLOCK": 256, "KEPT": kept, "EF": ef, "EVEN": True}
    moved = 4 * (3 if ef else 1) + (1 + kept / 256) / 8 + 2 / 256
    pointers = {"X": "fp32", "E": "fp32", "D": "u8", "P": "u8", "S": "bf16"}
    return Variant("rotsign_encode", rotsign_encode_kernel, pointers, constants, moved, bits=1)


def _mean_of_signs(world: int) -> Variant:
    constants = {"BLOCK": 256, "KEPT": 256, "WEIGHTED": False, "EVEN": True}
    moved = world * (2 / 8 + 2 / 256) + 4
    pointers = {"P": "u8", "S": "bf16", "D": "u8", "WEIGHTS": "bf16", "OUT": "fp32"}
    kernel = rotsign_mean_kernel
    return Variant("rotsign_mean", kernel, pointers, constants, moved, bits=1, straight=False)


def _topk(dtype: str, nbits: int, *, ef: bool) -> Variant:
    constants = {"K": 64, "CHUNK": 4096, "TILE": 4096, "NBITS": nbits, "EF": ef, "EVEN": True}
    pointers = {"X": dtype, "E": dtype, "KEPT": dtype, "INDEX": "i16"}
    moved = _SIZES[dtype] * (3 if ef else 1) + (2 + _SIZES[dtype]) / 64
    return Variant(
        "topk_encode", topk_encode.topk_encode_kernel, pointers, constants, moved, dtype, 4096
    )


def _rows(k: int) -> Variant:
    pointers = {"X": "bf16", "E": "bf16", "KEPT": "bf16", "INDEX": "u8"}
    constants = {"K": k, "EF": True, "EVEN": True}
    return Variant("top_rows", top_rows_kernel, pointers, constants, 6 + 3 * k / 64, "bf16")


_ROTATED: dict[str, Any] = {"rotate": True, "stochastic": True, "ef": True}

VARIANTS: Mapping[str, Variant] = {
    "encode 4 bits, rotated, dithered, EF, bf16": _encode(4, **_ROTATED),
    "encode 4 bits, rotated, dithered, EF, fp32": _encode(4, "fp32", **_ROTATED),
    "encode 4 bits, rotated, dithered, EF, tail": _encode(4, even=False, **_ROTATED),
    "encode 1 bit, rotated, l1, EF": _encode(1, scale="l1", rotate=True, ef=True),
    "encode 4 bits, nearest, fp32": _encode(4, "fp32"),
    "encode 8 bits of 256, nearest, fp32": _encode(8, "fp32", block=256),
    "encode 4 bits of 64, dithered, EF": _encode(4, block=64, stochastic=True, ef=True),
    "decode_mean of 8, 4 bits, rotated": _decode(8, 4, rotate=True),
    "decode_mean of 8, 1 bit, rotated": _decode(8, 1, rotate=True),
    "decode_mean of 8, 4 bits of 256, fp32": _decode(8, 4, "fp32", block=256),
    "decode_mean of 8, 4 bits, weighted": _decode(8, 4, weighted=True),
    "decode_mean of 64, 4 bits, rotated": _decode(64, 4, rotate=True),
    "decode_mean of 2, 4 bits, bytes": _decode(2, 4, words="u8"),
    "lloyd_encode of 256": _levels(ef=False),
    "lloyd_encode of 256, EF": _levels(ef=True),
    "lloyd_mean of 8": _mean_of_levels(8),
    "rotsign_encode 256 of 256": _signs(256, ef=False),
    "rotsign_encode 64 of 256, EF": _signs(64, ef=True),
    "rotsign_mean of 8": _mean_of_signs(8),
    "topk_encode 64 of 4096, EF, fp32": _topk("fp32", 31, ef=True),
    "topk_encode 64 of 4096, bf16": _topk("bf16", 15, ef=False),
    "top_rows 1 of 64, EF": _rows(1),
    "top_rows 2 of 64, EF": _rows(2),
    "sparse_mean of 8, 64 of 4096": Variant(
        "sparse_mean",
        sparse_mean_kernel,
        {"KEPT": "bf16", "INDEX": "i16", "OUT": "fp32"},
        {"W": 8, "K": 64, "LIST": 64, "CHUNK": 4096, "TILE": 4096},
        4 + 8 * 4 / 64,
        "bf16",
    ),
}

#: Compiled for every target, each kernel at least once; the others for ``sm_90`` alone, for time.
EVERYWHERE = frozenset(
    {
        "encode 4 bits, rotated, dithered, EF, bf16",
        "encode 4 bits, rotated, dithered, EF, fp32",
        "encode 1 bit, rotated, l1, EF",
        "encode 4 bits of 64, dithered, EF",
        "decode_mean of 8, 4 bits, rotated",
        "decode_mean of 8, 1 bit, rotated",
        "lloyd_encode of 256, EF",
        "lloyd_mean of 8",
        "rotsign_encode 64 of 256, EF",
        "rotsign_mean of 8",
        "topk_encode 64 of 4096, EF, fp32",
        "top_rows 2 of 64, EF",
        "sparse_mean of 8, 64 of 4096",
    }
)


def variants(target: str) -> list[str]:
    """Names of what is compiled for a target."""
    return [name for name in VARIANTS if target == "sm_90" or name in EVERYWHERE]


# -- compiling and reading -----------------------------------------------------------------------


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
    read = _read_amd if amd else _read_nvidia
    found = read(binary)
    widths = found.pop("widths")
    return {
        **found,
        "bytes": round(sum(width * n for width, n in widths.items()) * lanes, 3),
        "instructions": round(found["instructions"] * lanes, 2),
        "narrow": sum(n for width, n in widths.items() if width < 16),
        "narrowest": 8 * min(widths),
    }


_SASS = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)", re.MULTILINE
)


def _read_nvidia(binary: Any) -> Found:
    """Registers and shared memory as the loader sees them, the rest from the machine code."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        usage = _run(tools / "cuobjdump", "--dump-resource-usage", cubin)
        code = _run(tools / "nvdisasm", "-c", cubin)
    resources = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage))
    operations: collections.Counter[str] = collections.Counter()
    widths: collections.Counter[int] = collections.Counter()
    for full in _SASS.findall(code):
        operation, _, suffix = full.partition(".")
        if operation in ("NOP", "EXIT"):
            continue
        operations[operation] += 1
        if operation in ("LDG", "STG"):
            width = re.search(r"\b[US]?(8|16|64|128|256)\b", suffix)
            widths[int(width.group(1)) // 8 if width else 4] += 1
    return {
        "registers": int(resources["REG"]),
        "spills": int(resources["STACK"]) + operations["LDL"] + operations["STL"],
        "shared": max(int(resources["SHARED"]), binary.metadata.shared),
        "instructions": sum(operations.values()),
        "widths": widths,
    }


_AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}


def _read_amd(binary: Any) -> Found:
    """All of it from the assembler's text."""
    text = binary.asm["amdgcn"]
    code = text[: text.index(".rodata")] if ".rodata" in text else text

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    widths: collections.Counter[int] = collections.Counter()
    for kind in re.findall(r"\b(?:global|buffer|flat)_(?:load|store)_(\w+)", code):
        base, _, times = re.fullmatch(r"([a-z]+?)(?:_d16(?:_hi)?)?(x(\d))?", kind).groups()  # type: ignore[union-attr]
        widths[_AMD_WIDTHS[base] * int(times or 1)] += 1
    operations = re.findall(r"^\s+((?:v|s|ds|global|buffer|flat)_\w+)", code, re.MULTILINE)
    return {
        "registers": field("vgpr_count") + field("agpr_count"),
        "spills": sum(
            field(n) for n in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        ),
        "shared": max(field("group_segment_fixed_size"), binary.metadata.shared),
        "instructions": sum(not o.startswith(("s_nop", "s_endpgm")) for o in operations),
        "widths": widths,
    }


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def roofs(variant: Variant, found: Found) -> tuple[float, float | None]:
    """1e9 elements per second that an H200 can move, and that it can issue instructions for.

    The second is unknown where there is a loop, since only one turn of it was counted.
    """
    issue = ISSUE / found["instructions"] / 1e9 if variant.straight else None
    return BANDWIDTH / variant.moved / 1e9, issue


# -- the gate ------------------------------------------------------------------------------------


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
