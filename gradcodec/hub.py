"""Codec folders on disk, in the package and on the Hugging Face Hub. Knows nothing of codecs.

    config.json         what the codec is, its tensor table, a SHA-256 per weight, its digest
    model.safetensors   the weights, and nothing else
    README.md           the card

Reading is strict: an unknown key, a missing or extra weight, or one flipped bit is an error that
says what was expected and what came. There is no pickle anywhere, and no fallback to one.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gradcodec import wire
from gradcodec.errors import ConfigError, HubError, UpdateError
from gradcodec.types import DTYPE_CODES, TensorSpec, UpdateSpec

SCHEMA = 1
CONFIG_NAME: Final = "config.json"
WEIGHTS_NAME: Final = "model.safetensors"
CARD_NAME: Final = "README.md"
MAX_CONFIG_BYTES: Final = 1 << 26

#: Schema n -> function from a schema n document to a schema n+1 one. A step that changes what the
#: codec's digest covers ("codec", "spec", "weights") must set "digest" to the new one as well.
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

_REQUIRED: Final = frozenset({"schema", "library", "codec", "spec", "weights", "digest"})
_OPTIONAL: Final = frozenset({"notes"})
_HALVES: Final = {"encoder": ("encoder.", "shared."), "decoder": ("decoder.", "shared.")}
_PREFIXES: Final = ("encoder.", "decoder.", "shared.")
_DTYPE_NAMES: Final = {str(d).removeprefix("torch."): d for d in DTYPE_CODES}
_REPO_ID: Final = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


@dataclass(frozen=True, eq=False)
class Folder:
    """Everything a codec folder holds.

    Attributes:
        config: the codec's ``to_dict()``, ``"kind"`` included.
        spec: the tensor table the codec is bound to, if it is.
        weights: tensors by name; those of one half when only that was read.
        digests: hex SHA-256 by weight name, both halves' weights always.
        digest: the 8 bytes that payloads pin.
        notes: what the codec was fitted on, in the words of who fitted it.
    """

    config: dict[str, Any]
    spec: UpdateSpec | None
    weights: dict[str, Tensor]
    digests: dict[str, str]
    digest: bytes
    notes: str | None = None

    @property
    def kind(self) -> str:
        """The codec family."""
        return str(self.config["kind"])

    def check_digest(self, actual: bytes) -> None:
        """Raise ``HubError`` unless ``actual`` is the digest the codec was saved with."""
        if actual != self.digest:
            raise HubError(
                f"expected a {self.kind} codec of digest {self.digest.hex()}, its config, tensor "
                f"table and weights give {actual.hex()}: the folder was altered"
            )


# -- local folders ---------------------------------------------------------------------------------


def write(path: str | Path, folder: Folder, *, card: str | None = None) -> None:
    """Write the three files; each one appears whole or not at all.

    Args:
        path: created if missing; other files in it are left alone.
        folder: what to write, both halves' weights included.
        card: text of ``README.md``; generated when not given.

    Raises:
        ConfigError: weights are missing (one half was loaded) or were changed since the digest.
        HubError: the folder cannot be written.
    """
    document = _to_document(folder)
    # Clones, because safetensors refuses tensors that share memory.
    weights = {
        n: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for n, t in folder.weights.items()
    }
    for name, tensor in weights.items():
        if wire.tensor_digest(tensor) != folder.digests[name]:
            raise ConfigError(f"weight {name!r} was changed after the codec's digest was taken")
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _replacing(path / WEIGHTS_NAME) as temporary:
            safetensors.torch.save_file(weights, temporary, metadata={"format": "pt"})
        with _replacing(path / CONFIG_NAME) as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        with _replacing(path / CARD_NAME) as temporary:
            temporary.write_text(make_card(folder) if card is None else card, encoding="utf-8")
    except (OSError, safetensors.SafetensorError) as err:
        raise HubError(f"cannot write the codec folder {path}: {err}") from err


def bundled() -> list[str]:
    """Names of the codecs that are part of the package; they need no network."""
    root = _assets()
    return sorted(p.parent.name for p in root.glob(f"*/{CONFIG_NAME}"))


def read(name: str | Path, *, revision: str | None = None, half: str | None = None) -> Folder:
    """Read a codec by name.

    Args:
        name: tried in this order: a bundled name, an existing folder, a Hub id ``user/name``.
        revision: branch, tag or commit; only a Hub repository has one.
        half: ``"encoder"`` or ``"decoder"`` reads the weights of that half alone; the digests of
            all weights come along, so the codec's identity does not depend on it.

    Raises:
        HubError: missing, unreachable, incomplete or altered.
        ConfigError: ``config.json`` is of a newer schema, or has unknown, missing or bad entries.
    """
    if half is not None and half not in _HALVES:
        raise ConfigError(f"expected half of {sorted(_HALVES)} or None, got {half!r}")
    local = _assets() / name if isinstance(name, str) and name in bundled() else Path(name)
    if not local.is_dir() or not str(name):
        return _read_folder(_download(name, revision), str(name), half)
    if revision is not None:
        raise HubError(f"{name} is the folder {local}; only a Hub repository has a {revision=}")
    return _read_folder(local, str(name), half)


def _assets() -> Path:
    return Path(str(resources.files("gradcodec") / "assets" / "codecs"))


def _read_folder(path: Path, name: str, half: str | None) -> Folder:
    # A cached copy that went bad can only be deleted by who knows where it is.
    where = name if str(path) == name else f"{name} ({path})"
    try:
        came = sorted(os.listdir(path)) if path.is_dir() else []
        missing = [file for file in (CONFIG_NAME, WEIGHTS_NAME) if file not in came]
        if missing:
            raise HubError(f"expected a codec folder, {missing[0]} is missing; it has {came[:10]}")
        with (path / CONFIG_NAME).open("rb") as config:
            document = _parse(config.read(MAX_CONFIG_BYTES + 1))
        digests: dict[str, str] = document["weights"]
        return Folder(
            document["codec"],
            _spec_from_rows(document["spec"]),
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
    """The weights of ``half``, each checked against its digest; other tensors are not read."""
    wanted = _PREFIXES if half is None else _HALVES[half]
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(digests):
                raise HubError(
                    f"{WEIGHTS_NAME}: expected the {len(digests)} weights that {CONFIG_NAME} "
                    f"names, missing {sorted(set(digests) - names)[:3]}, "
                    f"not expected {sorted(names - set(digests))[:3]}"
                )
            # Cloned off the memory map: what was checked is what is used, whatever happens to
            # the file later.
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
                f"weight {name!r}: expected SHA-256 {digests[name]}, got {came}: altered"
            )
    return weights


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# -- the Hub ---------------------------------------------------------------------------------------


def push(
    repo_id: str,
    folder: Folder,
    *,
    revision: str | None = None,
    private: bool = False,
    token: str | None = None,
    message: str | None = None,
    card: str | None = None,
) -> str:
    """Publish the three files as one commit; the repository is created if there is none.

    Args:
        repo_id: ``user/name``.
        folder: what to publish.
        revision: branch to commit to, created if missing; the default branch when not given.
        private: visibility of a repository that is created; an existing one keeps its own.
        token: access token; ``HF_TOKEN`` or the stored login when not given.
        message: commit message.
        card: text of ``README.md``; generated when not given.

    Returns:
        URL of the commit.

    Raises:
        HubError: the Hub cannot be reached or refuses.
        ConfigError: one half of the weights is missing, or ``repo_id`` is not a repository id.
    """
    if not _REPO_ID.fullmatch(repo_id):
        raise ConfigError(f"expected a repository id 'user/name', got {repo_id!r}")
    from huggingface_hub import CommitOperationAdd, HfApi

    files = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)
    with tempfile.TemporaryDirectory() as local:
        write(local, folder, card=make_card(folder, repo_id) if card is None else card)
        try:
            api = HfApi(token=token, library_name="gradcodec")
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.create_commit(
                repo_id,
                [CommitOperationAdd(f, Path(local, f)) for f in files],
                commit_message=message or f"{folder.kind} codec {folder.digest.hex()}",
                revision=revision,
            )
        except Exception as err:
            raise _explain(err, repo_id, revision) from err
    return str(commit.commit_url)


def _download(name: str | Path, revision: str | None) -> Path:
    """Both files of one commit, from the Hub or the client's cache."""
    if isinstance(name, Path) or Path(name).exists() or not _REPO_ID.fullmatch(name):
        close = difflib.get_close_matches(str(name), bundled(), 1)
        raise HubError(
            f"expected a codec, got {str(name)!r}: no bundled codec has this name ({bundled()}), "
            "no such folder is here, and it is not a Hub repository id 'user/name'"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    from huggingface_hub import snapshot_download

    try:
        # A snapshot is of one commit. Two single downloads could straddle a push.
        path = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[CONFIG_NAME, WEIGHTS_NAME],
            library_name="gradcodec",
        )
    except Exception as err:
        raise _explain(err, name, revision) from err
    return Path(path)


def _explain(err: Exception, repo_id: str, revision: str | None) -> HubError:
    """What was expected of the Hub and what came.

    Callers catch ``Exception``: transport errors belong to the client's HTTP library, which has
    been another one in each of its major versions.
    """
    from huggingface_hub import constants, errors

    status = getattr(getattr(err, "response", None), "status_code", None)
    if isinstance(err, errors.GatedRepoError):
        expected = "a token of an account that was granted access; the repository is gated"
    elif isinstance(err, errors.RevisionNotFoundError):
        expected = f"an existing branch, tag or commit, there is no {revision!r}"
    elif isinstance(err, errors.RepositoryNotFoundError):
        expected = (
            "a repository of this name, there is none, or it is private and the token does not "
            f"open it; no folder of this name is here, and the bundled codecs are {bundled()}"
        )
    elif isinstance(err, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        expected = "a reachable Hub or a complete cached copy, there is neither"
    elif status in (401, 403):
        expected = f"a token with access (HF_TOKEN or token=), it was refused with {status}"
    else:
        expected = "a complete answer of the Hub"
    came = " ".join(str(err).split())[:300]
    return HubError(
        f"{repo_id} at {constants.ENDPOINT}: expected {expected} [{type(err).__name__}: {came}]"
    )


# -- the card --------------------------------------------------------------------------------------


_CARD: Final = """---
library_name: gradcodec
tags: [gradcodec, gradient-compression, federated-learning]
---

# {title}

A [gradcodec](https://pypi.org/project/gradcodec/) codec: it encodes model updates (gradients,
parameter differences) into few bytes and decodes them.

| | |
|---|---|
{table}

What it was fitted on: {notes}

```python
from gradcodec import Codec

codec = Codec.from_pretrained("{where}")
payload = codec.encoder.encode(update)
update = codec.decoder.decode(payload)
```
"""


def make_card(folder: Folder, name: str | None = None) -> str:
    """Text of ``README.md``: what the codec is, its sizes, its digest, how to load it."""
    stages = " > ".join(_stages(folder.config))
    nbytes = sum(t.numel() * t.element_size() for t in folder.weights.values())
    ratio, bits = _setting(folder.config, "ratio"), _setting(folder.config, "bits")
    facts = {"kind": stages, "weights": f"{nbytes} bytes in {len(folder.weights)} tensors"}
    if ratio:
        facts["ratio"] = f"{ratio:g} update elements per code value"
    if folder.spec is None:
        facts["update"] = "any: the codec is not bound to a tensor table"
    else:
        facts["update"] = f"{folder.spec.numel} elements in {len(folder.spec)} tensors"
        if ratio:
            values = math.ceil(folder.spec.numel / ratio)
            size = f", {math.ceil(values * bits / 8)} bytes at {bits:g} bits" if bits else ""
            facts["code"] = f"about {values} values{size}"
    facts["digest"] = f"`{folder.digest.hex()}`, in every payload"
    return _CARD.format(
        title=name or f"{stages} codec",
        table="\n".join(f"| {k} | {v} |" for k, v in facts.items()),
        notes=folder.notes or "not stated",
        where=name or "this folder or its Hub repository id",
    )


def _stages(config: Mapping[str, Any]) -> list[str]:
    """Kinds of a codec's innermost parts, in order of encoding."""
    inside = [s for v in config.values() if isinstance(v, dict) and "kind" in v for s in _stages(v)]
    return inside or [str(config["kind"])]


def _setting(config: Mapping[str, Any], key: str) -> float | None:
    """The first number called ``key`` in the config or a nested one."""
    if isinstance(config.get(key), int | float):
        return float(config[key])
    nested = (_setting(v, key) for v in config.values() if isinstance(v, dict))
    return next((v for v in nested if v is not None), None)


# -- config.json -----------------------------------------------------------------------------------


def _to_document(folder: Folder) -> dict[str, Any]:
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


def _parse(text: bytes) -> dict[str, Any]:
    """``config.json`` as a checked document of the current schema."""
    if len(text) > MAX_CONFIG_BYTES:
        raise HubError(f"expected {CONFIG_NAME} of at most {MAX_CONFIG_BYTES} bytes")
    try:
        document = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as err:  # not UTF-8 is a ValueError too
        raise HubError(f"{CONFIG_NAME}: expected JSON, got {text[:40]!r}: {err}") from err
    keys = sorted(document) if isinstance(document, dict) else type(document).__name__
    if not isinstance(document, dict) or not _is_size(document.get("schema")):
        raise ConfigError(f"{CONFIG_NAME}: expected a gradcodec config with a 'schema', got {keys}")
    if document["schema"] > SCHEMA:
        raise ConfigError(
            f"{CONFIG_NAME}: expected a schema of at most {SCHEMA}, got {document['schema']}, "
            f"written by {document.get('library')!r}: upgrade gradcodec"
        )
    while document["schema"] < SCHEMA:
        schema = document["schema"]
        if schema not in MIGRATIONS:
            raise ConfigError(f"{CONFIG_NAME}: no migration from schema {schema} to {schema + 1}")
        document = {**MIGRATIONS[schema](document), "schema": schema + 1}
    _check(document)
    return document


def _check(document: dict[str, Any]) -> None:
    """Raise ``ConfigError`` unless keys and values are as this schema has them."""
    missing, unknown = _REQUIRED - set(document), set(document) - _REQUIRED - _OPTIONAL
    if missing or unknown:
        raise ConfigError(
            f"{CONFIG_NAME}: expected keys {sorted(_REQUIRED)} and perhaps {sorted(_OPTIONAL)}, "
            f"missing {sorted(missing)}, unknown {sorted(unknown)}"
        )
    codec, weights = document["codec"], document["weights"]
    rules = {
        "codec": ("with a 'kind'", isinstance(codec, dict) and isinstance(codec.get("kind"), str)),
        # A weight of any other name would be in neither half and not be loaded with one.
        "weights": (
            f"as SHA-256 by name, names beginning with {_PREFIXES}",
            isinstance(weights, dict)
            and all(n.startswith(_PREFIXES) and _is_hex(v, 32) for n, v in weights.items()),
        ),
        "digest": ("of 8 hex bytes", _is_hex(document["digest"], wire.DIGEST_BYTES)),
        "notes": ("as text", isinstance(document.get("notes", ""), str)),
    }
    for key, (expected, holds) in rules.items():
        if not holds:
            came = _short(document[key])
            raise ConfigError(f"{CONFIG_NAME}: expected {key!r} {expected}, got {came}")


def _spec_from_rows(rows: Any) -> UpdateSpec | None:
    if rows is None:
        return None
    tensors = []
    for row in rows if isinstance(rows, list) else [rows]:
        match row:
            case [str(name), list(shape), str(dtype)] if (
                dtype in _DTYPE_NAMES and len(shape) <= wire.MAX_DIMS and all(map(_is_size, shape))
            ):
                tensors.append(TensorSpec(name, tuple(shape), _DTYPE_NAMES[dtype]))
            case _:
                raise ConfigError(
                    f"{CONFIG_NAME}: expected spec rows [name, [sizes], dtype] with a dtype of "
                    f"{sorted(_DTYPE_NAMES)}, got {_short(row)}"
                )
    try:
        spec = UpdateSpec(tuple(tensors))
    except UpdateError as err:
        raise ConfigError(f"{CONFIG_NAME}: {err}") from err
    if spec.numel > wire.MAX_NUMEL:
        raise ConfigError(
            f"{CONFIG_NAME}: {spec.numel} elements, at most {wire.MAX_NUMEL} expected"
        )
    return spec


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError(f"a key comes twice among {[k for k, _ in pairs][:10]}")
    return out


def _no_constant(value: str) -> Any:
    raise ValueError(f"{value} is not JSON")


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_hex(value: Any, nbytes: int) -> bool:
    return isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{2 * nbytes}}}", value) is not None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
