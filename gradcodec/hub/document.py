"""config.json: its schema, migrations and checks, and the rows of a tensor table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import metadata
from typing import Any, Final

from gradcodec import wire
from gradcodec.encodable import DTYPE_CODES, MAX_TENSORS, shown
from gradcodec.errors import ConfigError, HubError, UpdateError
from gradcodec.hub.folder import CONFIG_NAME, PREFIXES, Folder
from gradcodec.types import TensorSpec, UpdateSpec

SCHEMA = 1
MAX_CONFIG_BYTES: Final = 1 << 26

#: Schema n -> function from a document of schema n to one of schema n+1. A function that changes
#: what the codec's digest covers ("codec", "spec", "weights") must update "digest" as well.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

_REQUIRED: Final = frozenset({"schema", "library", "codec", "spec", "weights", "digest"})
_OPTIONAL: Final = frozenset({"notes"})
_DTYPE_NAMES: Final = {str(d).removeprefix("torch."): d for d in DTYPE_CODES}


def to_document(folder: Folder) -> dict[str, Any]:
    """The ``config.json`` of a codec, checked as it will be when it is read."""
    if set(folder.weights) != set(folder.digests):
        away = sorted(set(folder.digests) - set(folder.weights))
        raise ConfigError(f"only one half of the codec is here, cannot save it; missing {away[:3]}")
    try:
        version = metadata.version("gradcodec")
    except metadata.PackageNotFoundError:  # run from a source tree
        version = "unknown"
    rows = [[t.name, list(t.shape), str(t.dtype).removeprefix("torch.")] for t in folder.spec or ()]
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "library": f"gradcodec {version}",
        "codec": folder.config,
        "spec": None if folder.spec is None else rows,
        "weights": folder.digests,
        "digest": folder.digest.hex(),
    }
    if folder.notes is not None:
        document["notes"] = folder.notes
    _check(document)
    return document


def is_document(text: bytes) -> bool:
    """Whether gradcodec wrote this ``config.json``, of whatever schema; models have one too."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(document, dict) and str(document.get("library")).startswith("gradcodec ")


def parse(text: bytes) -> dict[str, Any]:
    """``config.json`` as a checked document of the current schema."""
    if len(text) > MAX_CONFIG_BYTES:
        raise HubError(f"expected {CONFIG_NAME} of at most {MAX_CONFIG_BYTES} bytes")
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as err:  # not UTF-8 is a ValueError too
        raise HubError(f"{CONFIG_NAME}: expected JSON, got {text[:40]!r}: {err}") from err
    keys = sorted(document) if isinstance(document, dict) else type(document).__name__
    if not isinstance(document, dict) or not _is_size(document.get("schema")):
        raise ConfigError(
            f"{CONFIG_NAME}: expected a gradcodec config with a 'schema', got {shown(keys)}"
        )
    if document["schema"] > SCHEMA:
        raise ConfigError(
            f"{CONFIG_NAME}: expected a schema of at most {SCHEMA}, got "
            f"{shown(document['schema'])}, written by {shown(document.get('library'))}: "
            "upgrade gradcodec"
        )
    while document["schema"] < SCHEMA:
        schema = document["schema"]
        if schema not in MIGRATIONS:
            raise ConfigError(f"{CONFIG_NAME}: no migration from schema {schema} to {schema + 1}")
        document = {**MIGRATIONS[schema](document), "schema": schema + 1}
    _check(document)
    return document


def _check(document: dict[str, Any]) -> None:
    """Raise ``ConfigError`` unless keys and values are those of the current schema."""
    missing, unknown = _REQUIRED - set(document), set(document) - _REQUIRED - _OPTIONAL
    if missing or unknown:
        raise ConfigError(
            f"{CONFIG_NAME}: expected keys {sorted(_REQUIRED)} and perhaps {sorted(_OPTIONAL)}, "
            f"missing {sorted(missing)}, unknown {shown(sorted(unknown))}"
        )
    codec, weights = document["codec"], document["weights"]
    rules = {
        "codec": ("with a 'kind'", isinstance(codec, dict) and isinstance(codec.get("kind"), str)),
        # A weight with any other prefix would belong to neither half, so no half would load it.
        "weights": (
            f"as SHA-256 by name, names beginning with {PREFIXES}",
            isinstance(weights, dict)
            and all(n.startswith(PREFIXES) and _is_hex(v, 32) for n, v in weights.items()),
        ),
        "digest": ("of 8 hex bytes", _is_hex(document["digest"], wire.DIGEST_BYTES)),
        "notes": ("as text", _is_text(document.get("notes", ""))),
    }
    for key, (expected, holds) in rules.items():
        if not holds:
            came = shown(document[key])
            raise ConfigError(f"{CONFIG_NAME}: expected {key!r} {expected}, got {came}")


def spec_from_rows(rows: Any) -> UpdateSpec | None:
    """The tensor table of a document; ``None`` for a codec that is not bound to a table."""
    if rows is None:
        return None
    if isinstance(rows, list) and len(rows) > MAX_TENSORS:
        raise ConfigError(f"{CONFIG_NAME}: expected at most {MAX_TENSORS} tensors, got {len(rows)}")
    tensors = []
    for row in rows if isinstance(rows, list) else [rows]:
        match row:
            case [str(name), list(shape), str(dtype)] if dtype in _DTYPE_NAMES and all(
                map(_is_size, shape)
            ):
                tensors.append(TensorSpec(name, tuple(shape), _DTYPE_NAMES[dtype]))
            case _:
                raise ConfigError(
                    f"{CONFIG_NAME}: expected spec rows [name, [sizes], dtype] with a dtype of "
                    f"{sorted(_DTYPE_NAMES)}, got {shown(row)}"
                )
    try:
        return UpdateSpec(tuple(tensors))
    except UpdateError as err:
        raise ConfigError(f"{CONFIG_NAME}: {err}") from err


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError(f"a key comes twice among {shown([k for k, _ in pairs[:10]])}")
    return out


def _no_constant(value: str) -> Any:
    raise ValueError(f"{value} is not JSON")


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: Any) -> bool:
    """Whether UTF-8 can write it; JSON can hold halves of a surrogate pair, which UTF-8 cannot."""
    return isinstance(value, str) and value == value.encode(errors="ignore").decode()


def _is_hex(value: Any, nbytes: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{2 * nbytes}}}", value) is not None
