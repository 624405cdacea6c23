"""Named bytes in one Flower ``Array``: one object on the wire, instead of two for each tensor.

magic "gcf1", then for each part: length of its name u16, of its bytes u64, name, bytes
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from gradcodec.encodable import shown
from gradcodec.errors import (
    MalformedBodyError,
    TruncatedError,
    UnsupportedVersionError,
    UpdateError,
)
from gradcodec.types import Update

_FAMILY = "gradcodec."

STYPE = f"{_FAMILY}1"
"""Says what is in the array, and its version; Flower passes arrays of unknown types on as they
are."""

KEY = "gradcodec"
"""The name of the array in its record."""

_MAGIC = b"gcf1"
_PART = struct.Struct("<HQ")


def packed(parts: Mapping[str, bytes]) -> ArrayRecord:
    """A record of one array that holds the parts."""
    pieces = [_MAGIC]
    for name, part in parts.items():
        key = name.encode()
        pieces += [_PART.pack(len(key), len(part)), key, part]
    data = b"".join(pieces)
    return ArrayRecord({KEY: Array("uint8", (len(data),), STYPE, data)})


def is_packed(record: ArrayRecord) -> bool:
    """Whether a record is one that ``packed`` made, of this version or of another one."""
    return len(record) == 1 and KEY in record and record[KEY].stype.startswith(_FAMILY)


def unpacked(record: ArrayRecord) -> dict[str, bytes]:
    """The parts of a record.

    Raises:
        UnsupportedVersionError: another version of gradcodec has made it.
        WireError: the bytes are not what ``packed`` makes.
    """
    if record[KEY].stype != STYPE:
        raise UnsupportedVersionError(
            f"expected an array of type {STYPE!r}, got {shown(record[KEY].stype)}: server and node "
            "have different versions of gradcodec"
        )
    data = record[KEY].data
    if data[: len(_MAGIC)] != _MAGIC:
        raise MalformedBodyError(f"expected {_MAGIC!r}, got {shown(data[: len(_MAGIC)])}")
    parts: dict[str, bytes] = {}
    at = len(_MAGIC)
    while at < len(data):
        if len(data) - at < _PART.size:
            raise TruncatedError(f"expected {_PART.size} bytes at {at}, got {len(data) - at}")
        named, length = _PART.unpack_from(data, at)
        at += _PART.size
        end = at + named + length
        if end > len(data):
            raise TruncatedError(f"expected {end} bytes, got {len(data)}")
        try:
            name = data[at : at + named].decode()
        except UnicodeDecodeError as err:
            raise MalformedBodyError(f"a part's name is not UTF-8: {err}") from err
        if name in parts:
            raise MalformedBodyError(f"part {shown(name)} comes twice")
        parts[name] = data[at + named : end]
        at = end
    return parts


def has_floats(record: ArrayRecord) -> bool:
    """Whether there is something to code; others (the bytes of trees) may change their shape."""
    return any(array.dtype.startswith(("float", "bfloat")) for array in record.values())


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """The arrays of a record as tensors; memory is shared where possible.

    Raises:
        UpdateError: an array cannot be read, or its dtype cannot be encoded.
    """
    out = {}
    for name, array in record.items():
        try:
            values = array.numpy()
            out[name] = torch.from_numpy(values if values.flags.writeable else values.copy())
        except (TypeError, ValueError) as err:
            raise UpdateError(f"{shown(name)}: expected an array that numpy reads: {err}") from err
    return out


def record_of(tensors: Update) -> ArrayRecord:
    """A record of plain arrays."""
    return ArrayRecord({name: Array(tensor.numpy()) for name, tensor in tensors.items()})


def to_record(state: Update) -> ArrayRecord:
    """A record of a module's state, also of one in bf16, which ``ArrayRecord(state)`` refuses.

        reply = RecordDict({"arrays": to_record(model.state_dict()), "metrics": metrics})

    Flower's arrays are numpy's, and numpy has no bf16. So bf16 travels as float32, which holds the
    same values; ``model.load_state_dict(record.to_torch_state_dict())`` rounds to bf16 again. What
    the server averages stays float32, and what crosses the wire is the codec's.

    Args:
        state: tensors by name, on any device.

    Raises:
        UpdateError: a tensor has a dtype that numpy lacks.
    """
    plain = {}
    for name, tensor in state.items():
        values = tensor.detach().cpu()
        plain[name] = values.float() if values.dtype == torch.bfloat16 else values
    try:
        return record_of(plain)
    except TypeError as err:
        raise UpdateError(f"expected dtypes that numpy or bf16 has: {err}") from err
