"""Codec folders on disk and in the package: written whole, read strictly."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gradcodec import wire
from gradcodec.encodable import DTYPE_CODES, shown
from gradcodec.errors import ConfigError, HubError
from gradcodec.hub.card import make_card
from gradcodec.hub.document import (
    MAX_CONFIG_BYTES,
    is_document,
    parse,
    spec_from_rows,
    to_document,
)
from gradcodec.hub.folder import (
    CARD_NAME,
    CONFIG_NAME,
    HALVES,
    PREFIXES,
    WEIGHTS_NAME,
    Folder,
)


def write(path: str | Path, folder: Folder, *, card: str | None = None) -> None:
    """Write the three files; each one appears whole or not at all.

    Args:
        path: created if missing; other files in it are left alone.
        folder: what to write, both halves' weights included.
        card: text of ``README.md``; generated when not given.

    Raises:
        ConfigError: weights are missing (only one half was loaded), or have changed since the
            digest was taken; or files of these names are there that are no codec's.
        HubError: the folder cannot be written.
    """
    document = to_document(folder)
    # Clones, because safetensors refuses tensors that share memory.
    weights = {
        n: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for n, t in folder.weights.items()
    }
    for name, tensor in weights.items():
        if wire.tensor_digest(tensor) != folder.digests[name]:
            raise ConfigError(f"weight {name!r} was changed after the codec's digest was taken")
    path = Path(path)
    check_place(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # All three are on the disk before the first of them, the last in this list, takes its
        # place: config.json, by which a later call knows whose folder this is.
        with (
            _replacing(path / WEIGHTS_NAME) as weights_file,
            _replacing(path / CARD_NAME) as card_file,
            _replacing(path / CONFIG_NAME) as config_file,
        ):
            # Not save_file: it makes files that only their owner can read.
            weights_file.write_bytes(safetensors.torch.save(weights, metadata={"format": "pt"}))
            card_file.write_text(make_card(folder) if card is None else card, encoding="utf-8")
            config_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    except (OSError, safetensors.SafetensorError) as err:
        raise HubError(f"cannot write the codec folder {path}: {err}") from err


def check_place(path: str | Path) -> None:
    """Check that a codec can be written into a folder without loss of anything else.

    Models and runs have files of the same names. A codec's own folder is written anew.

    Raises:
        ConfigError: the path is a file, or one of the three files is there and no codec's.
        HubError: the folder cannot be read.
    """
    path = Path(path)
    try:
        there = [n for n in (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME) if (path / n).exists()]
        config = (path / CONFIG_NAME).read_bytes() if CONFIG_NAME in there else b""
        file = path.exists() and not path.is_dir()
    except OSError as err:
        raise HubError(f"cannot read the codec folder {path}: {err}") from err
    if file:
        raise ConfigError(f"expected a folder for the codec, got {path}: it is a file")
    if there and not is_document(config):
        raise ConfigError(
            f"expected a new folder for the codec, or one that holds a codec, got {path}: its "
            f"{' and '.join(there)} would be lost; choose another folder"
        )


def bundled() -> list[str]:
    """Names of the codecs that are part of the package; they need no network."""
    root = _assets()
    return sorted(p.parent.name for p in root.glob(f"*/{CONFIG_NAME}"))


def bundled_path(name: str) -> Path:
    """Folder of a bundled codec."""
    return _assets() / name


def _assets() -> Path:
    return Path(str(resources.files("gradcodec") / "assets" / "codecs"))


def read_folder(path: Path, name: str, half: str | None) -> Folder:
    """Read and check a codec folder; errors call it ``name``."""
    # The error shows the path, so that a damaged copy in a cache can be found and deleted.
    where = name if str(path) == name else f"{name} ({path})"
    try:
        came = sorted(os.listdir(path)) if path.is_dir() else []
        missing = [file for file in (CONFIG_NAME, WEIGHTS_NAME) if file not in came]
        if missing:
            raise HubError(f"expected a codec folder, {missing[0]} is missing; it has {came[:10]}")
        with (path / CONFIG_NAME).open("rb") as config:
            document = parse(config.read(MAX_CONFIG_BYTES + 1))
        digests: dict[str, str] = document["weights"]
        return Folder(
            document["codec"],
            spec_from_rows(document["spec"]),
            _load_weights(path / WEIGHTS_NAME, digests, half),
            digests,
            bytes.fromhex(document["digest"]),
            document.get("notes"),
        )
    except ConfigError as err:
        raise ConfigError(f"{where}: {err}") from err
    except OSError as err:  # HubError is one
        raise HubError(f"{where}: {err}") from err


def _load_weights(path: Path, digests: Mapping[str, str], half: str | None) -> dict[str, Tensor]:
    """The weights of ``half``, each checked against its digest; the other half is not read."""
    wanted = PREFIXES if half is None else HALVES[half]
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(digests):
                raise HubError(
                    f"{WEIGHTS_NAME}: expected the {len(digests)} weights that {CONFIG_NAME} "
                    f"names, missing {shown(sorted(set(digests) - names)[:3])}, "
                    f"not expected {shown(sorted(names - set(digests))[:3])}"
                )
            # Cloned from the memory map: the values that are checked are those that are used,
            # whatever happens to the file later.
            weights = {n: file.get_tensor(n).clone() for n in digests if n.startswith(wanted)}
    except safetensors.SafetensorError as err:
        size = path.stat().st_size
        raise HubError(
            f"{WEIGHTS_NAME}: expected a whole safetensors file, {size} bytes came: {err}"
        ) from err
    for name, tensor in weights.items():
        came = wire.tensor_digest(tensor) if tensor.dtype in DTYPE_CODES else str(tensor.dtype)
        if came != digests[name]:
            raise HubError(
                f"weight {shown(name)}: expected SHA-256 {digests[name]}, got {came}: altered"
            )
    return weights


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``; its file replaces ``path`` if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
