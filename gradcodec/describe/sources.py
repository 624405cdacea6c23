"""What ``inspect`` is pointed at: an update's file, a codec's name, a payload's codec."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from gradcodec import hub
from gradcodec.codec import Codec
from gradcodec.describe.kinds import natural
from gradcodec.errors import ConfigError, GradcodecError, UpdateError
from gradcodec.registry import UNTRAINED, make_codec
from gradcodec.types import Update, UpdateSpec
from gradcodec.wire import Payload


def read_update(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name, layer 9 before layer 10 (such files sort names).

    Raises:
        ConfigError: the file cannot be read.
        UpdateError: it is no safetensors file, or holds no tensors that a codec takes.
    """
    try:
        blob = Path(path).read_bytes()
    except OSError as err:
        raise ConfigError(f"{path} cannot be read: {err.strerror}") from err
    try:
        found = safetensors.torch.load(blob)
    except (SafetensorError, KeyError, ValueError, TypeError) as err:
        raise UpdateError(
            f"{path}: expected a safetensors file with the tensors of an update, got {err!r}"
        ) from err
    if not found:
        raise UpdateError(f"{path}: expected the tensors of an update, got none")
    UpdateSpec.of(found)
    return {name: found[name] for name in sorted(found, key=natural)}


def writer_of(payload: Payload, update: Update | None) -> tuple[str, Codec] | None:
    """The codec that wrote a payload, if it is untrained or bundled; it is known by its digest.

    Args:
        payload: any payload.
        update: what it may hold: the table that an untrained codec would be bound to, whose
            payloads carry none.

    Returns:
        The codec's name and the codec; ``None`` if only its folder has it.
    """
    spec = None if payload.has_table or update is None else UpdateSpec.of(update)
    for name, codec in _candidates(payload.codec, spec):
        if codec.digest == payload.digest:
            return name, codec
    return None


def _candidates(kind: str, spec: UpdateSpec | None) -> Iterator[tuple[str, Codec]]:
    """Codecs of a kind that are here without a folder of the user's."""
    for name in UNTRAINED:
        codec = make_codec(name)
        if codec.config.kind == kind:
            try:
                yield name, codec if spec is None else codec.bind(spec)
            except GradcodecError:  # it takes no such tensors, so it has not written them
                continue
    for name in hub.bundled():
        codec = Codec.from_pretrained(name)
        if codec.config.kind == kind:
            yield name, codec
