"""Codecs in files: a codec from the contents of a codec folder, and back.

``hub`` reads and writes the folders and knows nothing of codecs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gradcodec import hub
from gradcodec.claims import check_claim
from gradcodec.codec.kinds import codec_class
from gradcodec.errors import ConfigError, UpdateError

if TYPE_CHECKING:
    from gradcodec.codec.codec import Codec


def load(name: str | Path, revision: str | None, half: str | None) -> Codec:
    """The codec that a name means; see ``Codec.from_pretrained``."""
    folder = hub.read(name, revision=revision, half=half)
    parts = {"spec": folder.spec, "weights": folder.weights, "weight_digests": folder.digests}
    try:
        codec = codec_class(folder.kind).from_config(folder.config, **parts)
        _check_claim(codec)
    except (ConfigError, UpdateError) as err:
        raise ConfigError(f"{name}: {err}") from err
    folder.check_digest(codec.digest)
    codec.notes = folder.notes
    return codec


def folder_of(codec: Codec) -> hub.Folder:
    """What a codec's folder holds.

    Raises:
        ConfigError: the table claims more than ``load`` would allow.
    """
    _check_claim(codec)
    return hub.Folder(
        codec.config.to_dict(),
        codec.spec,
        codec.weights,
        codec.weight_digests,
        codec.digest,
        codec.notes,
    )


def _check_claim(codec: Codec) -> None:
    if codec.spec is not None:
        check_claim(codec.config.kind, codec.spec, codec.nbytes())
