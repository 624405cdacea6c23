"""TGAP's gathering of gradients over clients and time, in both readings of the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from gradcodec.codecs.identity import Identity
from gradcodec.errors import ConfigError
from gradcodec.federated.loop import Federation, LoopConfig, Task
from gradcodec.federated.server import Server
from gradcodec.types import Update

READINGS = ("federated", "local")


@dataclass(frozen=True)
class Collected:
    """What gathering cost: wire bytes in each direction and the held-out loss it ended at."""

    uplink_bytes: int
    downlink_bytes: int
    final_loss: float | None


def collect(
    task: Task,
    watch: Callable[[], AbstractContextManager[Any]],
    config: LoopConfig,
    how: str = "federated",
    progress: Callable[[int, int], None] | None = None,
    observe: Callable[[Sequence[Update]], None] | None = None,
) -> Collected:
    """Fine-tune on the task's (D1) data under watch; parameters are put back after.

    Args:
        task: its shards are each client's D1.
        watch: makes the context manager around each local training: ``lambda: recorder``.
        config: rounds and clients.
        how: ``"federated"``: uncompressed federated averaging (v3 of the paper); what a server sees
            of it, the updates, costs no byte beyond these rounds. ``"local"``: every client trains
            a model of its own for ``config.rounds`` rounds (v1, v2); nothing is sent, but the
            statistics of clients must be.
        progress: called after each round (federated) or client (local): how many, of how many.
        observe: told the updates of each round's clients, as the server sees them (federated).

    Raises:
        ConfigError: ``how`` is neither, or there is no server that could observe.
    """
    if how not in READINGS:
        raise ConfigError(f"expected a reading of {READINGS}, got {how!r}")
    if observe is not None and how != "federated":
        raise ConfigError("only a federated reading has rounds whose updates a server sees")
    initial = {n: p.detach().cpu().clone() for n, p in task.parameters.items()}
    up = down = 0
    loss = None
    if how == "federated":
        federation = Federation(
            task, Server(initial, Identity()), config, watch=watch, observe=observe
        )
        for report in federation.run():
            if progress is not None:
                progress(federation.finished, config.rounds)
            up, down, loss = up + report.uplink_bytes, down + report.downlink_bytes, report.loss
    else:
        taking_part = sorted({c for r in range(config.rounds) for c in config.sample(r)})
        for done, client in enumerate(taking_part, 1):
            _load(task, initial)
            for number in range(config.rounds):
                parameters = list(task.parameters.values())
                optimizer = task.optimizer(parameters, **task.optimizer_options)
                with watch():
                    task.train(client, number, optimizer)
            if progress is not None:
                progress(done, len(taking_part))
    _load(task, initial)
    return Collected(up, down, loss)


@torch.no_grad()
def _load(task: Task, state: dict[str, torch.Tensor]) -> None:
    for name, p in task.parameters.items():
        p.copy_(state[name])
