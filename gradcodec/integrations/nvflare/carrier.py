"""What a DXO carries: plain tensors before a filter, named bytes after it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from nvflare.apis.dxo import DXO, MetaKey
from torch import Tensor

from gradcodec.encodable import check_tensor, shown
from gradcodec.errors import ConfigError, MalformedBodyError, UpdateError
from gradcodec.types import Update

ALGORITHM = "gradcodec"
"""What an encoded DXO says in ``PROCESSED_ALGORITHM``."""

NOTE = "gradcodec"
"""The meta entry of an encoded DXO: what is needed to restore it beside the bytes."""

Note = dict[str, Any]


def is_encoded(dxo: DXO) -> bool:
    """Whether a filter of this package has encoded it."""
    return bool(dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM) == ALGORITHM)


def check_plain(dxo: DXO, who: str) -> None:
    """Check that no other filter has changed what the values mean.

    Raises:
        ConfigError: they were encrypted, quantised, or encoded already.
    """
    by = dxo.get_meta_prop(MetaKey.PROCESSED_ALGORITHM)
    if by is None and not dxo.get_meta_prop(MetaKey.PROCESSED_KEYS):
        return
    instead = (
        f"add {who} once per task"
        if by == ALGORITHM
        else f"leave out either that filter or {who}; encrypted and quantised values have no code"
    )
    raise ConfigError(
        f"{who}: expected plain tensors, got data processed by {shown(by)}; {instead}"
    )


def tensors_of(dxo: DXO) -> tuple[dict[str, Tensor], str]:
    """The tensors of a DXO, and ``"numpy"`` or ``"torch"``: what they were.

    Memory is shared with the DXO where possible; nothing in it is changed.

    Raises:
        UpdateError: a value is neither an array nor a tensor, or its dtype cannot be encoded.
    """
    out: dict[str, Tensor] = {}
    kinds = set()
    for name, value in dxo.data.items():
        if isinstance(value, Tensor):
            kinds.add("torch")
            out[name] = value.detach().cpu()
        elif isinstance(value, np.ndarray | np.generic):
            kinds.add("numpy")
            out[name] = _from_numpy(name, np.asarray(value))
        else:
            raise UpdateError(
                f"{shown(name)}: expected a numpy array or a torch tensor, got "
                f"{type(value).__name__}; encrypted and serialized values cannot be encoded"
            )
        check_tensor(name, out[name])
    return out, "torch" if "torch" in kinds else "numpy"


def _from_numpy(name: str, array: np.ndarray[Any, Any]) -> Tensor:
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if not native.flags.writeable or any(stride < 0 for stride in native.strides):
        native = native.copy()  # torch warns of the first and refuses the second
    try:
        return torch.from_numpy(native)
    except TypeError as err:
        raise UpdateError(f"{shown(name)}: {array.dtype} cannot be encoded: {err}") from err


def plain(dxo: DXO, tensors: Update, kind: Any) -> DXO:
    """A DXO of tensors, as numpy arrays or torch tensors; the marks of encoding are removed.

    Raises:
        MalformedBodyError: ``kind`` is neither, or numpy has no such dtype.
    """
    data: dict[str, Any] = dict(tensors)
    if kind == "numpy":
        try:
            data = {name: tensor.numpy() for name, tensor in tensors.items()}
        except TypeError as err:
            raise MalformedBodyError(f"numpy has no such dtype: {err}") from err
    elif kind != "torch":
        raise MalformedBodyError(f"expected tensors of 'numpy' or 'torch', got {shown(kind)}")
    return DXO(dxo.data_kind, data, _meta(dxo))


def encoded(dxo: DXO, parts: Mapping[str, bytes], note: Note) -> DXO:
    """A DXO of named bytes, each an array, uint8; the given one is not changed.

    NVFLARE may hold the same DXO for several sites, so a filter makes a new one.
    """
    data = {name: np.frombuffer(part, np.uint8) for name, part in parts.items()}
    marks = {MetaKey.PROCESSED_ALGORITHM: ALGORITHM, NOTE: note}
    return DXO(dxo.data_kind, data, {**_meta(dxo), **marks})


def _meta(dxo: DXO) -> dict[str, Any]:
    """The meta of a DXO without marks, and without its history, which NVFLARE passes on itself."""
    marks = (MetaKey.PROCESSED_ALGORITHM, NOTE, MetaKey.FILTER_HISTORY)
    return {key: value for key, value in dxo.meta.items() if key not in marks}


def parts_of(dxo: DXO, keys: Iterable[str]) -> tuple[dict[str, bytes], Note]:
    """The named bytes of an encoded DXO, and its note, which has exactly these keys.

    Raises:
        MalformedBodyError: it has others, or a part is not bytes.
    """
    note = dxo.get_meta_prop(NOTE)
    if not isinstance(note, dict) or set(note) != set(keys):
        raise MalformedBodyError(f"expected a note of {sorted(keys)}, got {shown(note)}")
    parts = {}
    for name, value in dxo.data.items():
        is_bytes = isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1
        if not isinstance(name, str) or not is_bytes:
            raise MalformedBodyError(
                f"expected named bytes, each an array, uint8, got {shown(name)}: {shown(value)}"
            )
        parts[name] = value.tobytes()
    return parts, note
