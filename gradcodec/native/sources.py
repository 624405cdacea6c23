"""The C sources and how they are compiled; ``setup.py`` reads this, so it imports nothing of ours.

Floating point must not be fused or reordered: results are bit for bit those of torch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).parent / "src"

FLAGS = [
    "-O3",
    "-std=gnu11",
    "-ffp-contract=off",
    # Nothing here looks at errno or at the floating-point flags, and results are the same.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-g0",
]


def units() -> list[Path]:
    """The files that are compiled."""
    return sorted(FOLDER.glob("*.c"))


def headers() -> list[Path]:
    """The files that the units include."""
    return sorted(FOLDER.glob("*.h"))


def digest() -> str:
    """16 hexadecimal digits of all sources and flags; empty where the sources are not installed."""
    files = units() + headers()
    if not files:
        return ""
    text = hashlib.sha256(" ".join(FLAGS).encode())
    for path in files:
        # Line ends may differ between checkouts, which changes nothing that is compiled.
        text.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return text.hexdigest()[:16]
