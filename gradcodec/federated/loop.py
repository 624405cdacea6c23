"""The plain federated loop: sample, send, train, collect, average; every byte counted.

Each message really is encoded to bytes and decoded from them; nothing is passed by reference. A
framework adapter replaces this file, not ``server.py`` or ``replica.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from gradcodec import metrics
from gradcodec.errors import ConfigError, EmptyClientError, NonFiniteError, TrainingError, WireError
from gradcodec.faf import LatentOptimizer
from gradcodec.federated.client import Client
from gradcodec.federated.envelope import KINDS, Broadcast, Reply
from gradcodec.federated.participants import ClientId, client_id, in_order
from gradcodec.federated.server import Server
from gradcodec.representation import represent
from gradcodec.types import Update


@dataclass(frozen=True)
class LocalResult:
    """What a client reports of its local training: examples seen, mean training loss."""

    examples: int
    loss: float


class Task(Protocol):
    """A model and the clients' data, as the loop needs them."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """What is trained and sent, by name."""

    @property
    def optimizer(self) -> type[torch.optim.Optimizer]:
        """The clients' optimiser class; made anew for each client and round."""

    @property
    def optimizer_options(self) -> Mapping[str, Any]:
        """Its settings, ``lr`` and so on."""

    def train(self, client: Any, round: int, optimizer: torch.optim.Optimizer) -> LocalResult:
        """Train ``parameters`` in place on one client's data; seeded by client and round alone."""

    def evaluate(self) -> float:
        """Held-out loss of the current parameters."""


@dataclass(frozen=True)
class LoopConfig:
    """Who takes part: ``per_round`` of ``clients`` in each of ``rounds``, sampled by ``seed``."""

    rounds: int
    clients: Sequence[ClientId]
    per_round: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 1 or not 1 <= self.per_round <= len(self.clients):
            raise ConfigError(
                f"expected rounds >= 1 and per_round of 1..{len(self.clients)} clients, "
                f"got {self.rounds} and {self.per_round}"
            )

    def sample(self, round: int) -> list[ClientId]:
        """The clients of one round, the same for every scheme."""
        rng = np.random.default_rng([self.seed, round])
        chosen = rng.choice(len(self.clients), self.per_round, replace=False)
        return sorted((client_id(self.clients[int(i)]) for i in chosen), key=in_order)


@dataclass
class RoundReport:
    """What happened in one round; byte counts are of this round, both payload and wire."""

    round: int
    loss: float
    train_loss: float
    participants: list[ClientId]
    rejected: dict[ClientId, str]
    uplink_payload_bytes: int = 0
    uplink_bytes: int = 0
    downlink_payload_bytes: int = 0
    downlink_bytes: int = 0
    snr_db: float = 0.0
    mean_snr_db: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``rejected`` as pairs, since JSON's keys are strings."""
        return {**asdict(self), "rejected": [list(pair) for pair in self.rejected.items()]}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> RoundReport:
        """Inverse of ``to_dict``; also reads ``rejected`` as an object, which older files have."""
        told = row["rejected"]
        pairs = told if isinstance(told, list) else [(int(c), t) for c, t in told.items()]
        return cls(**{**row, "rejected": dict(pairs)})


@dataclass
class _Sums:
    """Weighted sums of one round, for the signal-to-noise ratio of the mean update."""

    sent: dict[str, Tensor] = field(default_factory=dict)
    true: dict[str, Tensor] = field(default_factory=dict)

    def add(self, true: Update, sent: Update, weight: float) -> None:
        for sums, update in ((self.true, true), (self.sent, sent)):
            for name, t in update.items():
                value = weight * t.detach().cpu().float()
                sums[name] = sums[name] + value if name in sums else value


class Federation:
    """A task, a server and the clients' replicas, moved on round by round.

    Args:
        task: model and data.
        server: holds the codecs and the aggregation rule.
        config: sampling.
        watch: makes the context manager around each client's training (a TGAP recorder).
        observe: called at the end of each round with the updates decoded from its replies.
    """

    def __init__(
        self,
        task: Task,
        server: Server,
        config: LoopConfig,
        *,
        watch: Callable[[], AbstractContextManager[Any]] | None = None,
        observe: Callable[[Sequence[Update]], None] | None = None,
    ) -> None:
        self.task, self.server, self.config, self.watch = task, server, config, watch
        self.observe = observe
        self.clients: dict[ClientId, Client] = {}
        self.versions: dict[ClientId, int] = {}
        self.finished = 0

    def run(self) -> Iterator[RoundReport]:
        """Yield a report after each remaining round; the global state is then in the task."""
        while self.finished < self.config.rounds:
            yield self.step()

    def step(self) -> RoundReport:
        """One round.

        If a client's update cannot be encoded or its reply is refused, only that reply is lost; the
        client is reported under ``rejected``.

        Raises:
            TrainingError: no client of the round gave a usable reply.
        """
        began = time.perf_counter()
        report = RoundReport(self.finished, 0.0, 0.0, [], {})
        losses, sums, snrs = [], _Sums(), []
        decoded: list[Update] = []
        invited = self.config.sample(self.finished)
        self.server.abandon_round()  # clears what a failed attempt may have left
        self.server.invite(invited)
        for client in invited:
            start = self._deliver(client, report)
            self._load(start)
            try:
                blob, result, true = self._train(client, start, report)
                report.uplink_bytes += len(blob)  # a refused reply has crossed the wire as well
                clock = time.perf_counter()
                reply = self.server.receive(blob, sender=client)
                report.decode_s += time.perf_counter() - clock
            except (NonFiniteError, WireError, EmptyClientError) as err:
                report.rejected[client] = f"{type(err).__name__}: {err}"
                continue
            report.participants.append(client)
            report.uplink_payload_bytes += len(reply.payload.body)
            losses.append(result.loss)
            sent = self._decoded(reply)
            if self.observe is not None:
                decoded.append(sent)
            snrs.append(metrics.snr_db(true, sent))
            sums.add(true, sent, float(result.examples))
        if not report.participants:
            raise TrainingError(
                f"round {self.finished}: no client gave a usable reply: {report.rejected}"
            )
        if self.observe is not None:
            self.observe(decoded)
        clock = time.perf_counter()
        self.server.close_round()
        for client in self.server.dropped:
            report.participants.remove(client)
            report.rejected[client] = "dropped: it would have made the state infinite"
        report.decode_s += time.perf_counter() - clock
        self.load_global()
        report.loss = self.task.evaluate()
        report.train_loss = float(np.mean(losses))
        report.snr_db = float(np.mean(snrs))
        report.mean_snr_db = metrics.snr_db(sums.true, sums.sent)
        report.seconds = time.perf_counter() - began
        self.finished += 1
        return report

    def _deliver(self, number: ClientId, report: RoundReport) -> Update:
        """Send a client what it missed, and return the state it arrives at."""
        client = self.clients.get(number)
        if client is None:
            # After a resume: bring it to where it was; those bytes have been counted already.
            client = self.server.client(number, self.versions.get(number, 0))
            self.clients[number] = client
        blob = self.server.broadcast(client.version)
        clock = time.perf_counter()
        state = client.receive(blob)
        report.decode_s += time.perf_counter() - clock
        self.versions[number] = client.version
        report.downlink_bytes += len(blob)
        report.downlink_payload_bytes += Broadcast.from_bytes(blob, KINDS).payload_nbytes
        return state

    def _train(
        self, number: ClientId, start: Update, report: RoundReport
    ) -> tuple[bytes, LocalResult, dict[str, Tensor]]:
        """Train locally; returns the reply's bytes, the result, and the update before encoding."""
        task, client = self.task, self.clients[number]
        optimizer: torch.optim.Optimizer
        if client.config.mode == "latent":
            optimizer = LatentOptimizer(
                task.parameters, client.codec, task.optimizer, **task.optimizer_options
            )
        else:
            optimizer = task.optimizer(list(task.parameters.values()), **task.optimizer_options)
        with nullcontext() if self.watch is None else self.watch():
            result = task.train(number, self.finished, optimizer)
        end = {n: p.detach().cpu() for n, p in task.parameters.items()}
        clock = time.perf_counter()
        trained = optimizer if isinstance(optimizer, LatentOptimizer) else end
        blob = client.reply(trained, result.examples)
        report.encode_s += time.perf_counter() - clock
        return blob, result, represent(client.config.representation, end, start)

    @torch.no_grad()
    def _decoded(self, reply: Reply) -> dict[str, Tensor]:
        """The update that the server decodes from a reply, for the report and ``observe`` only."""
        codec = self.server.uplink
        update = codec.decoder.decode(reply.payload)
        if self.server.config.mode == "latent" and not codec.linear:
            zero = codec.from_code(torch.zeros(codec.code_numel(self.server.replica.spec)))
            update = {n: t - zero[n] for n, t in update.items()}
        return update

    def load_global(self) -> None:
        """Put the global state into the task's parameters."""
        self._load(self.server.replica.state())

    @torch.no_grad()
    def _load(self, state: Update) -> None:
        for name, p in self.task.parameters.items():
            p.copy_(state[name])
