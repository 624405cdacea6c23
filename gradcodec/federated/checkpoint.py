"""A federation on disk after each round, so that a kill at any moment loses at most one round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from gradcodec import files
from gradcodec.errors import ConfigError
from gradcodec.federated.loop import Federation, RoundReport
from gradcodec.federated.participants import client_id
from gradcodec.federated.server import Server

ANEW = "delete it to start again from round 0"


class Kept(Protocol):
    """State that the rounds fill outside the federation, to be saved with it."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that has to be saved."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what ``state_dict`` returned; ``ConfigError`` if that is not possible."""


def save(
    path: str | Path,
    federation: Federation,
    reports: Sequence[RoundReport],
    beside: Mapping[str, Kept] | None = None,
) -> None:
    """Write one safetensors file: the server's tensors, and the reports so far as metadata.

    The file appears whole or not at all, and its SHA-256 is in it. The previous checkpoint is kept
    (``gradcodec.files.previous``) if the filesystem has hard links.

    Args:
        path: the file.
        federation: between two rounds.
        reports: the reports of the rounds so far.
        beside: what else to save, by name.

    Raises:
        OSError: the file cannot be written; the previous checkpoint is unchanged.
    """
    meta = {
        "finished": federation.finished,
        "versions": [[c, v] for c, v in federation.versions.items()],
        "reports": [r.to_dict() for r in reports],
        # Identifies the sampling: with another one this would not be the same run.
        "next": federation.config.sample(federation.finished),
    }
    tensors = prefixed("server", federation.server.state_dict())
    for name, part in (beside or {}).items():
        tensors |= prefixed(name, part.state_dict())
    files.save_tensors(path, tensors, meta, keep=True)


def load(
    path: str | Path, federation: Federation, beside: Mapping[str, Kept] | None = None
) -> list[RoundReport]:
    """Put a federation of the same settings back where ``save`` left it; returns its reports.

    Clients are rebuilt from the increments when they next take part. If the file is damaged, the
    previous checkpoint is read instead, with a warning in the log: one round is done again.

    Raises:
        ConfigError: the file and the previous one are damaged, or it is not a checkpoint of this
            federation. Nothing has changed then, in the parts of ``beside`` neither.
    """
    tensors, meta = files.load_tensors(path, ANEW)
    try:
        finished = int(meta["finished"])
        versions = {client_id(c): int(v) for c, v in meta["versions"]}
        reports = [RoundReport.from_dict(row) for row in meta["reports"]]
        sample = federation.config.sample(finished)
        if meta["next"] != sample:
            raise ConfigError(
                f"its round {finished} has clients {meta['next']}, here they are {sample}"
            )
        parts: dict[str, Kept] = {"server": federation.server, **(beside or {})}
        _load_all([(part, unprefixed(name, tensors)) for name, part in parts.items()])
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        text = str(err) if isinstance(err, ConfigError) else repr(err)
        raise ConfigError(f"{path} is not a checkpoint of this federation: {text}; {ANEW}") from err
    federation.finished, federation.versions, federation.clients = finished, versions, {}
    return reports


def save_server(path: str | Path, server: Server, settings: str) -> None:
    """Write a server alone, for frameworks that have a loop of their own.

    Args:
        path: the file, written as by ``save``.
        server: between two rounds.
        settings: what makes it, as text; ``load_server`` compares it.

    Raises:
        OSError: the file cannot be written; the previous checkpoint is unchanged.
    """
    tensors = prefixed("server", server.state_dict())
    files.save_tensors(path, tensors, {"settings": settings}, keep=True)


def load_server(path: str | Path, server: Server, settings: str) -> None:
    """Put a server of the same settings back where ``save_server`` left it.

    If the file is damaged, the previous checkpoint is read instead, as by ``load``.

    Raises:
        ConfigError: the file and the previous one are damaged, or of another federation. Nothing
            has changed then.
    """
    tensors, meta = files.load_tensors(path, ANEW)
    try:
        if meta["settings"] != settings:
            raise ConfigError(f"its settings are {meta['settings']}, here they are {settings}")
        server.load_state_dict(unprefixed("server", tensors))
    except (AttributeError, KeyError, TypeError, ValueError) as err:
        text = str(err) if isinstance(err, ConfigError) else repr(err)
        raise ConfigError(f"{path} is not a checkpoint of this federation: {text}; {ANEW}") from err


def _load_all(states: Sequence[tuple[Kept, Mapping[str, Tensor]]]) -> None:
    """Load every state; if one is refused, put back those that were loaded before it."""
    before: list[tuple[Kept, dict[str, Tensor]]] = []
    try:
        for part, state in states:
            was = part.state_dict()
            part.load_state_dict(state)
            before.append((part, was))
    except Exception:
        for part, was in before:
            part.load_state_dict(was)
        raise


def prefixed(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A part's tensors, named ``name/key``."""
    return {f"{name}/{key}": t for key, t in state.items()}


def unprefixed(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of ``prefixed``; tensors of other parts are left out."""
    return {k.removeprefix(f"{name}/"): t for k, t in tensors.items() if k.startswith(f"{name}/")}
