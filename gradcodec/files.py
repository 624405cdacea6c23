"""Files that are written whole or not at all, and in which every changed bit is detected.

* ``replacing``: a file appears under its name when all of it is on the disk, never before.
* a *seal*: the SHA-256 of a whole file, kept within it, so that no bit of it can change unseen.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from gradcodec.errors import ConfigError

_log = logging.getLogger(__name__)

# Name of a file while it is written: its final name, the process id, a random number.
_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{8}\.tmp")

_SEAL = "sha256"
_BLANK = b"0" * 64
# As ``json.dumps`` and as safetensors write it. Quotes within a JSON string are escaped, so no
# value can be mistaken for a seal.
_SEALED = re.compile(rb'"sha256": ?"([0-9a-f]{64})"')


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path``, whole and on the disk, if the block succeeds.

    Until then ``path`` stays as it was, however the block or the process ends. Any number of
    processes may do this at once: the last one wins.

    Raises:
        OSError: the file cannot be written; no part of it is left behind.
    """
    path = Path(path)
    beside = _beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as err:
        if err.filename is not None or err.errno is None:
            raise
        # The error of a failed write names no file, and "no space left" helps only with a path.
        raise OSError(err.errno, os.strerror(err.errno), str(path)) from err
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def remove_temporaries(folder: Path) -> None:
    """Delete unfinished files of killed processes in ``folder``; nobody may be writing there."""
    for path in folder.rglob(".*.tmp"):
        if is_temporary(path.name):
            path.unlink(missing_ok=True)


def is_temporary(name: str) -> bool:
    """Whether this is the name of a file that ``replacing`` has not finished."""
    return _TEMPORARY.fullmatch(name) is not None


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _sync_folder(folder: Path) -> None:
    """Put the new name on the disk as well, where the system supports it."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -- sealed files ----------------------------------------------------------------------------------


def seal(blob: bytes) -> bytes:
    """Replace the one blank seal in ``blob`` by the SHA-256 of ``blob`` as given."""
    (found,) = _SEALED.finditer(blob)
    start, end = found.span(1)
    if blob[start:end] != _BLANK:
        raise ValueError("expected a blank seal")
    return blob[:start] + hashlib.sha256(blob).hexdigest().encode() + blob[end:]


def is_sealed(blob: bytes) -> bool:
    """Whether the bytes have a seal at all, right or wrong."""
    return _SEALED.search(blob) is not None


def damage(blob: bytes) -> str | None:
    """What is wrong with a sealed file's bytes, or ``None`` if they are as they were written."""
    found = list(_SEALED.finditer(blob))
    if not found:
        return f"no SHA-256 in its {len(blob)} bytes: cut short, or of an earlier version"
    if len(found) > 1:
        return f"expected one SHA-256 in its {len(blob)} bytes, found {len(found)}"
    start, end = found[0].span(1)
    actual = hashlib.sha256(blob[:start])
    actual.update(_BLANK)
    actual.update(memoryview(blob)[end:])
    if actual.hexdigest().encode() != blob[start:end]:
        return f"expected SHA-256 {blob[start:end].decode()}, got {actual.hexdigest()}"
    return None


def save_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write an object as sealed JSON; its SHA-256 is an additional key."""
    text = json.dumps({**value, _SEAL: _BLANK.decode()}, indent=1) + "\n"
    with replacing(path) as file:
        file.write(seal(text.encode()))


def load_json(path: str | Path, way_out: str) -> dict[str, Any]:
    """Read what ``save_json`` wrote.

    Args:
        path: the file.
        way_out: what to do if the file is damaged; the error message ends with it.

    Raises:
        ConfigError: the file cannot be read, a bit of it has changed, or it was never sealed.
    """
    blob = _read(Path(path))
    why = damage(blob)
    if why is not None:
        raise ConfigError(f"{path} is damaged ({why}); {way_out}")
    value: dict[str, Any] = json.loads(blob)
    del value[_SEAL]
    return value


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], *, keep: bool = False
) -> None:
    """Write a sealed safetensors file: ``tensors``, and ``meta`` as JSON in its header.

    Args:
        path: the file; it appears whole or not at all.
        tensors: copied to the CPU; they may share memory.
        meta: plain JSON values.
        keep: keep the old file as ``previous(path)``, which ``load_tensors`` can fall back to.
    """
    path = Path(path)
    # Clones, because safetensors refuses tensors that share memory.
    copies = {
        n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()
    }
    header = {"meta": json.dumps(meta), _SEAL: _BLANK.decode()}
    blob = seal(safetensors.torch.save(copies, metadata=header))
    with replacing(path) as file:
        file.write(blob)
        if keep:
            _keep(path)


def _keep(path: Path) -> None:
    """Give a file a second name, ``previous``; it has its first name throughout."""
    beside = _beside(path)
    # Without hard links, or without an old file, nothing is kept; the new file is whole.
    with suppress(OSError):
        os.link(path, beside)
        os.replace(beside, previous(path))
        # If both are names of the same file, the rename above does nothing (POSIX).
        beside.unlink(missing_ok=True)


def previous(path: str | Path) -> Path:
    """Where ``save_tensors(..., keep=True)`` keeps the file that was there before."""
    path = Path(path)
    return path.with_name(path.name + ".previous")


def load_tensors(path: str | Path, way_out: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the ``meta`` that ``save_tensors`` wrote.

    If the file is damaged, and the previous one was kept and is whole, the previous one replaces
    it, with a warning in the log.

    Raises:
        ConfigError: the file cannot be read, a bit of it has changed, or it was never sealed;
            the message of the last two ends with ``way_out``.
    """
    path = Path(path)
    blob = _read(path)
    why = damage(blob)
    if why is not None:
        before = previous(path)
        blob = before.read_bytes() if before.is_file() else b""
        if damage(blob) is not None:
            raise ConfigError(f"{path} is damaged ({why}); {way_out}")
        _log.warning("%s is damaged (%s): going on from the one before", path, why)
        # Now, because the next save would keep the damaged file instead of the good one.
        with suppress(OSError):
            os.replace(before, path)
    try:
        size = int.from_bytes(blob[:8], "little")
        meta: dict[str, Any] = json.loads(json.loads(blob[8 : 8 + size])["__metadata__"]["meta"])
        return safetensors.torch.load(blob), meta
    except (SafetensorError, KeyError, TypeError, ValueError) as err:  # whole, but not ours
        raise ConfigError(f"{path} holds something else: {err!r}; {way_out}") from err


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise ConfigError(f"{path} cannot be read: {err.strerror}") from err
