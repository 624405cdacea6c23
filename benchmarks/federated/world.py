"""The federated world of one seed, and the rounds that any ``Method`` plays in it.

examples --Dirichlet--> clients --3:7--> D1 (what TGAP may see) | D2 (what is trained on)

Model, data, seeds and sampling are those of ``gradcodec.recipes`` (``Experiment``), so equal seeds
mean equal clients for every scheme. Only the arithmetic is another: the clients of a round train
side by side (``benchmarks.federated.cohort``).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from benchmarks.federated import payload
from benchmarks.federated.cohort import CohortLlama
from benchmarks.federated.methods import Method, State
from gradcodec.errors import NonFiniteError, TrainingError, WireError
from gradcodec.federated import LoopConfig
from gradcodec.recipes import data, models
from gradcodec.recipes.data import Encoded
from gradcodec.recipes.settings import Settings
from gradcodec.recipes.task import batch_schedule

Parameters = dict[str, nn.Parameter]
Shards = Mapping[int, Sequence[Encoded]]
Row = dict[str, Any]
Watch = Callable[[Parameters], AbstractContextManager[Any]]


class World:
    """Base model, clients' data and held-out examples; methods do not change it.

    Args:
        settings: as of the federated example; ``rounds`` and ``local.lr`` are ``play``'s.
        compute: type of the products with frozen weights.

    Attributes:
        initial: adapter values that every participant derives from the seed, by name, on the CPU.
        d1, d2: each client's examples, by client number.
        held: held-out examples.
        tokenizer: the base model's.
    """

    def __init__(self, settings: Settings, compute: torch.dtype = torch.bfloat16) -> None:
        self.settings = s = settings
        self.device = models.resolve_device(s.device)
        base, self.tokenizer = models.load_base(s.model, device=self.device, revision=s.revision)
        self.net = CohortLlama(base, scale=s.lora_alpha / s.lora_r, compute=compute)
        models.add_lora(base, r=s.lora_r, alpha=s.lora_alpha, targets=s.targets, seed=s.seed)
        self.initial: State = {
            n: p.detach().cpu().clone() for n, p in models.adapter_parameters(base).items()
        }
        examples = data.load_examples(s.dataset, limit=s.limit)
        kept, held = data.held_out(examples, s.held_out, s.seed)
        encoded = [data.encode_example(self.tokenizer, e, s.max_length) for e in kept]
        self.held = [data.encode_example(self.tokenizer, e, s.max_length) for e in held]
        parts = data.dirichlet_partition(
            [e.label for e in kept], s.clients, s.dirichlet, s.seed, s.min_client
        )
        splits = [data.split_d1_d2(part, s.d1, seed=s.seed + c) for c, part in enumerate(parts)]
        self.d1 = {c: [encoded[i] for i in d1] for c, (d1, _) in enumerate(splits)}
        self.d2 = {c: [encoded[i] for i in d2] for c, (_, d2) in enumerate(splits)}

    def loop(self, rounds: int, seed: int | None = None) -> LoopConfig:
        """Who takes part when; ``seed`` of the sampling, the world's by default."""
        s = self.settings
        return LoopConfig(rounds, range(s.clients), s.per_round, s.seed if seed is None else seed)

    def parameters(self, state: State) -> Parameters:
        """Trainable copies of a state, where the model is."""
        return {n: nn.Parameter(t.detach().to(self.device, copy=True)) for n, t in state.items()}

    def train(
        self,
        clients: Sequence[int],
        parameters: Sequence[Parameters],
        optimizers: Sequence[torch.optim.Optimizer],
        round: int,
        shards: Shards,
    ) -> list[float]:
        """One round's local training of several clients, in place; mean loss of each.

        As ``LanguageTask.train``, but that no client waits for another: clipping and optimiser are
        each client's own. What an optimiser does not hold is neither clipped nor counted. The
        parameters of a client whose optimiser fails become NaN.
        """
        local, seed = self.settings.local, self.settings.seed
        schedules = [batch_schedule(local, len(shards[c]), (seed, c, round)) for c in clients]
        trained = [_held(p, o) for p, o in zip(parameters, optimizers, strict=True)]
        losses: list[list[float]] = [[] for _ in clients]
        for step in range(max(len(schedule) for schedule in schedules)):
            active = [i for i, schedule in enumerate(schedules) if step < len(schedule)]
            batches = [[shards[clients[i]][e] for e in schedules[i][step]] for i in active]
            for i in active:
                for p in parameters[i].values():
                    p.grad = None
            loss = self.net([parameters[i] for i in active], batches)
            total: Any = loss.sum()
            total.backward()  # clients share no trainable tensor: the sum's gradient is each's
            for i, value in zip(active, loss.tolist(), strict=True):
                nn.utils.clip_grad_norm_(trained[i], local.clip)
                try:
                    optimizers[i].step()
                except (TrainingError, NonFiniteError):  # this client's alone
                    for p in parameters[i].values():
                        p.data.fill_(math.nan)
                losses[i].append(value)
        return [sum(values) / len(values) for values in losses]

    @torch.no_grad()
    def evaluate(self, state: State) -> float:
        """Mean held-out loss in nats per answer token."""
        return float(self.net([{n: t.to(self.device) for n, t in state.items()}], [self.held]))

    @functools.cached_property
    def start_loss(self) -> float:
        """Held-out loss before the first round."""
        return self.evaluate(self.initial)


@functools.lru_cache(maxsize=2)
def world_of(settings: Settings) -> World:
    """The world of these settings, kept for the next run in this process."""
    return World(settings)


def play(
    world: World,
    method: Method,
    *,
    lr: float,
    rounds: int,
    shards: Shards | None = None,
    seed: int | None = None,
    watch: Watch | None = None,
) -> Iterator[Row]:
    """Yield a row after each round; all byte counts are cumulative.

    A client whose training or reply fails costs its reply, not the round. Where no reply is left,
    the server cannot go on or the held-out loss is not finite, the last row says ``diverged``.

    Args:
        world: model and data.
        method: both ends of the federation, fresh.
        lr: clients' learning rate in the first round; falls linearly to zero after the last.
        rounds: how many.
        shards: what clients train on, D2 by default.
        seed: of the sampling, the world's by default.
        watch: makes a context manager around each client's training (a recorder).
    """
    one = [(method, lr)]
    for _, row in play_together(world, one, rounds=rounds, shards=shards, seed=seed, watch=watch):
        yield row


def play_together(
    world: World,
    runs: Sequence[tuple[Method, float]],
    *,
    rounds: int,
    shards: Shards | None = None,
    seed: int | None = None,
    watch: Watch | None = None,
) -> Iterator[tuple[int, Row]]:
    """``play`` of several methods with their learning rates, in step; yields (which, its row).

    Equal seeds mean equal clients, so one pass trains those of all methods: a GPU is busier with
    sixteen clients than with four. ``seconds`` are those of the pass, shared out evenly. A run that
    diverges leaves; the others go on.
    """
    shards = world.d2 if shards is None else shards
    loop = world.loop(rounds, seed)
    live = {i: _Run(world, method, lr, rounds) for i, (method, lr) in enumerate(runs)}
    for number in range(rounds):
        began = time.perf_counter()
        clients = loop.sample(number)
        for run in live.values():
            run.open(number, clients)
        training = [run for run in live.values() if run.error is None]
        everyone = [(c, p, o) for run in training for c, p, o in run.trainees()]
        with ExitStack() as stack:
            if watch is not None:
                for _, own, _ in everyone:
                    stack.enter_context(watch(own))
            losses = _trained(world, everyone, number, shards)
        for i, run in enumerate(training):
            run.close(losses[i * len(clients) : (i + 1) * len(clients)], shards)
        seconds = (time.perf_counter() - began) / len(live)
        for i, run in list(live.items()):
            yield i, run.finished(seconds)
            if run.row["diverged"]:
                del live[i]
        if not live:
            return


Trainee = tuple[int, Parameters, torch.optim.Optimizer]


def _trained(world: World, everyone: Sequence[Trainee], number: int, shards: Shards) -> list[float]:
    if not everyone:
        return []
    clients, parameters, optimizers = (list(each) for each in zip(*everyone, strict=True))
    return world.train(clients, parameters, optimizers, number, shards)


class _Run:
    """One method's part of ``play_together``: its messages, its counts, what went wrong.

    Attributes:
        row: of the round that is going on; its counts are cumulative.
        error: why the run cannot go on.
    """

    def __init__(self, world: World, method: Method, lr: float, rounds: int) -> None:
        self.world, self.method, self.lr, self.rounds = world, method, lr, rounds
        self.error: str | None = None
        self._seen: set[int] = set()
        self._first: float | None = None
        self.row: Row = {
            "start_loss": world.start_loss,
            "uplink_bytes": 0,
            "uplink_payload_bytes": 0,
            "downlink_bytes": 0,
            "downlink_payload_bytes": 0,
            "codec_bytes": method.codec_bytes,
            "participations": 0,
        }
        self._kept = tuple(self.row)

    def open(self, number: int, clients: Sequence[int]) -> None:
        """Deliver the state to the round's clients and give them optimisers."""
        self._seen.update(clients)
        self.row = {name: self.row[name] for name in self._kept}
        self.row |= {
            "round": number + 1,
            "participants": list(clients),
            "clients_seen": len(self._seen),
        }
        decay = self.world.settings.local.weight_decay
        options = {"lr": self.lr * (1 - number / self.rounds), "weight_decay": decay}
        self._parameters: list[Parameters] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        with self._failing():
            for client in clients:
                blob, state = self.method.deliver(client)
                _count(self.row, "downlink", self.method, blob)
                own = self.world.parameters(state)
                self._parameters.append(own)
                self._optimizers.append(
                    self.method.optimizer(client, own, torch.optim.AdamW, **options)
                )
            self.row["participations"] += len(clients)

    def trainees(self) -> Iterator[Trainee]:
        """Client, parameters and optimiser of everyone in this round."""
        yield from zip(self.row["participants"], self._parameters, self._optimizers, strict=True)

    def close(self, losses: Sequence[float], shards: Shards) -> None:
        """Replies, the server's step, and what it was worth."""
        self.row["train_loss"] = sum(losses) / len(losses)
        self.row["rejected"] = rejected = {}
        with self._failing():
            for client, own, optimizer in self.trainees():
                end = {n: p.detach().cpu() for n, p in own.items()}
                try:
                    if not all(bool(torch.isfinite(t).all()) for t in end.values()):
                        raise NonFiniteError("training diverged")
                    blob = self.method.reply(client, optimizer, end, len(shards[client]))
                    # A refused reply has crossed the wire as well.
                    _count(self.row, "uplink", self.method, blob)
                    self.method.receive(blob)
                except (NonFiniteError, WireError) as err:
                    rejected[client] = f"{type(err).__name__}: {err}"
            if len(rejected) == len(self._parameters):
                raise TrainingError(f"no client gave a usable reply: {rejected}")
            self.method.close_round()
            self.row["loss"] = self.world.evaluate(self.method.state())

    def finished(self, seconds: float) -> Row:
        """The round's row."""
        row = self.row
        loss = row.get("loss", math.nan)
        row["diverged"] = self.error is not None or not math.isfinite(loss)
        row["loss"] = None if row["diverged"] else loss
        if self.error is not None:
            row["error"] = self.error
        row["seconds"] = round(seconds, 2)
        if hasattr(self.method, "loss_progress") and not row["diverged"]:
            # Every client knows its own loss: no bytes.
            self._first = row["train_loss"] if self._first is None else self._first
            self.method.loss_progress = self._first - row["train_loss"]
        return dict(row)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What fails in here ends this run, not the others."""
        try:
            yield
        except (TrainingError, NonFiniteError) as err:
            self.error = f"{type(err).__name__}: {err}"


def _held(parameters: Parameters, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimiser moves: all, where it holds something else (a code)."""
    inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [p for p in parameters.values() if id(p) in inside] or list(parameters.values())


def _count(row: Row, way: str, method: Method, blob: bytes) -> None:
    """Count a message's wire bytes, and its payload's where they are known."""
    body = (payload.uplink if way == "uplink" else payload.downlink)(method, blob)
    key = f"{way}_payload_bytes"
    row[f"{way}_bytes"] += len(blob)
    row[key] = None if body is None else row[key] + body
