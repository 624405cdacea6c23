"""Gather gradients for TGAP over clients and time, in both readings of the paper."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gradcodec import files
from gradcodec.codecs import Identity
from gradcodec.errors import ConfigError
from gradcodec.federated import checkpoint
from gradcodec.federated.checkpoint import Kept
from gradcodec.federated.loop import Federation, LoopConfig, Task
from gradcodec.federated.participants import ClientId, in_order
from gradcodec.federated.server import Server
from gradcodec.types import Update

READINGS = ("federated", "local")
ANEW = "delete it to gather again"

Progress = Callable[[int, int], None]
Watch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Collected:
    """What gathering cost.

    Attributes:
        uplink_bytes, downlink_bytes: wire bytes in each direction.
        final_loss: held-out loss at the end; ``None`` for a local reading.
        seconds: how long it took, without interruptions.
    """

    uplink_bytes: int
    downlink_bytes: int
    final_loss: float | None
    seconds: float


def collect(
    task: Task,
    watch: Watch,
    config: LoopConfig,
    how: str = "federated",
    progress: Progress | None = None,
    observe: Callable[[Sequence[Update]], None] | None = None,
    *,
    path: str | Path | None = None,
    filled: Mapping[str, Kept] | None = None,
) -> Collected:
    """Fine-tune on the task's D1 data under ``watch``; parameters are restored afterwards.

    Args:
        task: its shards are each client's D1.
        watch: makes the context manager around each local training: ``lambda: recorder``.
        config: rounds and clients.
        how: ``"federated"``: uncompressed federated averaging (v3 of the paper); the server sees
            the updates, which costs no bytes beyond these rounds. ``"local"``: every client trains
            its own model for ``config.rounds`` rounds (v1, v2); no updates are sent, but the
            clients' statistics must be.
        progress: called after each round (federated) or client (local) with how many are finished
            and how many there are.
        observe: called after each round with its clients' updates, as the server sees them
            (federated only).
        path: file to save the progress to after each round or client. If it exists, gathering
            resumes from it; the result is to the bit that of an uninterrupted run.
        filled: what the watchers fill (moments, snapshot stores), by any names; saved in ``path``
            and restored from it. After a resume, what is not named here starts empty.

    Raises:
        ConfigError: ``how`` is not a reading, ``observe`` was given for a local reading, or
            ``path`` is damaged or of another gathering.
        OSError: ``path`` cannot be written; the previous file is unchanged.
    """
    if how not in READINGS:
        raise ConfigError(f"expected a reading of {READINGS}, got {how!r}")
    if observe is not None and how != "federated":
        raise ConfigError("only a federated reading has rounds whose updates a server sees")
    where = None if path is None else Path(path)
    initial = {n: p.detach().cpu().clone() for n, p in task.parameters.items()}
    if how == "federated":
        federation = Federation(
            task, Server(initial, Identity()), config, watch=watch, observe=observe
        )
        gathered = _federated(federation, progress, where, filled or {})
    else:
        gathered = _local(task, watch, config, progress, where, filled or {}, initial)
    _load(task, initial)
    return gathered


def _federated(
    federation: Federation,
    progress: Progress | None,
    path: Path | None,
    filled: Mapping[str, Kept],
) -> Collected:
    reports = []
    if path is not None and path.exists():
        reports = checkpoint.load(path, federation, filled)
    rounds = federation.config.rounds
    for report in federation.run():
        reports.append(report)
        if path is not None:
            checkpoint.save(path, federation, reports, filled)
        if progress is not None:
            progress(federation.finished, rounds)
    return Collected(
        sum(r.uplink_bytes for r in reports),
        sum(r.downlink_bytes for r in reports),
        reports[-1].loss,
        sum(r.seconds for r in reports),
    )


def _local(
    task: Task,
    watch: Watch,
    config: LoopConfig,
    progress: Progress | None,
    path: Path | None,
    filled: Mapping[str, Kept],
    initial: dict[str, torch.Tensor],
) -> Collected:
    clients = sorted({c for r in range(config.rounds) for c in config.sample(r)}, key=in_order)
    finished, seconds = 0, 0.0
    if path is not None and path.exists():
        finished, seconds = _load_local(path, clients, filled)
    for client in clients[finished:]:
        began = time.perf_counter()
        _load(task, initial)
        for number in range(config.rounds):
            parameters = list(task.parameters.values())
            optimizer = task.optimizer(parameters, **task.optimizer_options)
            with watch():
                task.train(client, number, optimizer)
        finished += 1
        seconds += time.perf_counter() - began
        if path is not None:
            meta = {"clients": clients, "finished": finished, "seconds": seconds}
            tensors = {
                key: t
                for name, part in filled.items()
                for key, t in checkpoint.prefixed(name, part.state_dict()).items()
            }
            files.save_tensors(path, tensors, meta, keep=True)
        if progress is not None:
            progress(finished, len(clients))
    return Collected(0, 0, None, seconds)


def _load_local(
    path: Path, clients: Sequence[ClientId], filled: Mapping[str, Kept]
) -> tuple[int, float]:
    """Restore ``filled``; returns how many clients are finished, and the seconds they took."""
    tensors, meta = files.load_tensors(path, ANEW)
    try:
        if meta["clients"] != clients:
            raise ConfigError(f"expected clients {clients}, got {meta['clients']}")
        finished, seconds = int(meta["finished"]), float(meta["seconds"])
        for name, part in filled.items():
            part.load_state_dict(checkpoint.unprefixed(name, tensors))
    except (KeyError, TypeError, ValueError) as err:
        text = str(err) if isinstance(err, ConfigError) else repr(err)
        raise ConfigError(f"{path} is not of this gathering: {text}; {ANEW}") from err
    return finished, seconds


@torch.no_grad()
def _load(task: Task, state: dict[str, torch.Tensor]) -> None:
    for name, p in task.parameters.items():
        p.copy_(state[name])
