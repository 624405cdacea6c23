"""What is in a compiled kernel: registers, spills, shared memory, instructions, accesses."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

Found = dict[str, Any]

_SASS = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)", re.MULTILINE
)


def read_nvidia(binary: Any) -> Found:
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


def read_amd(binary: Any) -> Found:
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
