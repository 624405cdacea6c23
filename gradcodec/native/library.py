"""Finding, checking and calling the C library; tensors as C sees them.

It is an ordinary shared library, called through ``ctypes``, which releases the GIL. A library that
was built from other sources, or for another version, is refused: its results may differ.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.native import sources

ABI = 3
"""``GRADCODEC_ABI`` of ``src/levels.h``."""

SWITCH = "GRADCODEC_NATIVE"
"""Environment variable: ``0`` turns the library off, a level's name (``sse2``) sets the level."""

_INT, _SIZE, _SEED, _AT = ctypes.c_int, ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p
_TYPED = (_AT, _INT)  # memory and the dtype of what is in it
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "random_bytes": (None, _SEED, _SIZE, _SEED, _AT),
    "encode": (
        *(None, *_TYPED, _SIZE, _SIZE, _INT, _SIZE, _INT, _INT, _INT, _SEED, *_TYPED),
        *(_INT, _AT, _AT),
    ),
    "decode": (
        *(None, _AT, _SIZE, _AT, _SIZE, _SIZE, _AT, _SIZE, _SIZE, _INT, _SIZE, _INT),
        *(_INT, _INT, _AT),
    ),
    "topk": (_INT, *_TYPED, _SIZE, _SIZE, _SIZE, *_TYPED, _AT, _AT),
    "rows": (None, *_TYPED, _SIZE, _SIZE, *_TYPED, _AT, _AT),
    "lloyd": (_INT, *_TYPED, _SIZE, _SIZE, *_TYPED, _AT, _AT),
    "lloyd_mean": (None, _AT, _SIZE, _AT, _SIZE, _SIZE, _AT, _SIZE, _SIZE, _AT),
    "rotsign": (None, *_TYPED, _AT, _SIZE, _SIZE, _SIZE, *_TYPED, _AT, _AT),
    "rotsign_mean": (
        *(None, _AT, _SIZE, _AT, _SIZE, _AT, _SIZE, _SIZE, _AT, _SIZE, _SIZE, _SIZE, _AT),
    ),
    "sparse_mean": (_INT, *_TYPED, _AT, _SIZE, _SIZE, _SIZE, _SIZE, _SIZE, _AT),
}


_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers by which C knows dtypes."""


@dataclass(frozen=True)
class Library:
    """An open library; ``level`` is the one in use of ``levels``, which are slowest first."""

    path: Path
    handle: ctypes.CDLL
    levels: tuple[str, ...]
    level: str

    def call(self, name: str, *args: Any) -> Any:
        """``gradcodec_NAME(level, *args)``."""
        return getattr(self.handle, f"gradcodec_{name}")(self.levels.index(self.level), *args)


def find() -> Path | None:
    """The library beside this module, whatever suffix the machine's extensions have."""
    built = [p for p in Path(__file__).parent.glob("_library.*") if p.suffix in (".so", ".pyd")]
    return max(built, key=lambda p: p.stat().st_mtime, default=None)


def load(path: Path, level: str = "") -> Library:
    """Open a library and check that it is this version's.

    Raises:
        ConfigError: it cannot be loaded, is of another version or other sources, or has no such
            level on this machine.
    """
    try:
        handle = ctypes.CDLL(str(path))
        abi = handle.gradcodec_abi()
        handle.gradcodec_sources.restype = handle.gradcodec_level.restype = ctypes.c_char_p
        made_of = handle.gradcodec_sources().decode()
    except (OSError, AttributeError) as reason:
        raise ConfigError(f"{path.name} is not a gradcodec library: {reason}") from reason
    if abi != ABI:
        raise ConfigError(f"{path.name} is stale: expected version {ABI}, got {abi}; {_AGAIN}")
    expected = sources.digest()
    if expected not in ("", made_of):
        raise ConfigError(f"{path.name} is stale: its sources have changed since; {_AGAIN}")
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(handle, f"gradcodec_{name}")
        function.restype, function.argtypes = result, [_INT, *arguments]
    levels = tuple(handle.gradcodec_level(i).decode() for i in range(handle.gradcodec_levels()))
    level = level or levels[-1]
    if level not in levels:
        raise ConfigError(f"expected one of the levels {levels} of this machine, got {level!r}")
    return Library(path, handle, levels, level)


_AGAIN = "install gradcodec again to build it again"
_current: Library | None = None
_reason = ""


def select(path: Path | None = None, level: str = "") -> Library:
    """Use the library at ``path``, or else the current or installed one, at one of its levels."""
    global _current
    path = path or (_current.path if _current else find())
    if path is None:
        raise ConfigError(
            "not built: install gradcodec, or its checkout, where there is a compiler"
        )
    _current = load(path, level)
    return _current


def current() -> Library:
    """The library in use; ``ConfigError`` with the reason if there is none."""
    if _current is None:
        raise ConfigError(f"gradcodec.native is {_reason}")
    return _current


def available() -> bool:
    """Whether there is a library to compute with."""
    return _current is not None


def status() -> str:
    """``"built, avx2"``, ``"off: .."`` or ``"not built: .."``, for people."""
    return f"built, {_current.level}" if _current else _reason


def at(what: str, tensor: Tensor | None, numel: int, *dtypes: torch.dtype) -> int | None:
    """Address of a tensor of ``numel`` values; ``None``, a null pointer, if there is none."""
    if tensor is None:
        return None
    if (
        tensor.numel() != numel
        or tensor.dtype not in dtypes
        or not tensor.is_contiguous()
        or tensor.device.type != "cpu"
    ):
        raise ConfigError(
            f"{what}: expected {numel} contiguous values of {dtypes} on the CPU, got "
            f"{tensor.numel()} of {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def typed(what: str, tensor: Tensor | None, numel: int) -> tuple[int | None, int]:
    """Address of a floating tensor, and the number by which C knows its dtype."""
    if tensor is None:
        return None, 0
    return at(what, tensor, numel, *_DTYPES), _DTYPES[tensor.dtype]


def _start() -> None:
    global _reason
    wish = os.environ.get(SWITCH, "")
    if wish == "0":
        _reason = f"off: {SWITCH}=0"
        return
    try:
        select(level="" if wish == "1" else wish)
    except ConfigError as reason:
        # A level that was asked for and is missing is an error; a missing library is not.
        if wish not in ("", "1") and find() is not None:
            raise
        told = str(reason)
        _reason = told if told.startswith("not built") else f"not usable: {told}"


_start()
