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
from contextlib import AbstractContextManager, ExitStack
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
        each client's own. What an optimiser does not hold is neither clipped nor counted.
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
                optimizers[i].step()
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
    shards = world.d2 if shards is None else shards
    loop = world.loop(rounds, seed)
    seen: set[int] = set()
    first: float | None = None
    row: Row = {
        "start_loss": world.start_loss,
        "uplink_bytes": 0,
        "uplink_payload_bytes": 0,
        "downlink_bytes": 0,
        "downlink_payload_bytes": 0,
        "codec_bytes": method.codec_bytes,
        "participations": 0,
    }
    for number in range(rounds):
        began = time.perf_counter()
        clients = loop.sample(number)
        seen.update(clients)
        now = {**row, "round": number + 1, "participants": clients, "clients_seen": len(seen)}
        try:
            rate = lr * (1 - number / rounds)
            _round(world, method, clients, number, rate, shards, watch, now)
            loss = world.evaluate(method.state())
        except (TrainingError, NonFiniteError) as err:
            loss, now["error"] = math.nan, f"{type(err).__name__}: {err}"
        now["loss"] = loss if math.isfinite(loss) else None
        now["diverged"] = not math.isfinite(loss)
        now["seconds"] = round(time.perf_counter() - began, 2)
        yield now
        if now["diverged"]:
            return
        if hasattr(method, "loss_progress"):  # every client knows its own loss: no bytes
            first = now["train_loss"] if first is None else first
            method.loss_progress = first - now["train_loss"]
        row = {name: now[name] for name in row}


def _round(
    world: World,
    method: Method,
    clients: Sequence[int],
    number: int,
    lr: float,
    shards: Shards,
    watch: Watch | None,
    row: Row,
) -> None:
    """Deliver, train, reply, aggregate; counts bytes and notes what went wrong in ``row``."""
    parameters, optimizers = [], []
    options = {"lr": lr, "weight_decay": world.settings.local.weight_decay}
    for client in clients:
        blob, state = method.deliver(client)
        _count(row, "downlink", method, blob)
        parameters.append(world.parameters(state))
        optimizers.append(method.optimizer(client, parameters[-1], torch.optim.AdamW, **options))
    row["participations"] += len(clients)
    with ExitStack() as stack:
        if watch is not None:
            for own in parameters:
                stack.enter_context(watch(own))
        losses = world.train(clients, parameters, optimizers, number, shards)
    row["train_loss"] = sum(losses) / len(losses)
    row["rejected"] = rejected = {}
    for client, own, optimizer in zip(clients, parameters, optimizers, strict=True):
        end = {n: p.detach().cpu() for n, p in own.items()}
        try:
            if not all(bool(torch.isfinite(t).all()) for t in end.values()):
                raise NonFiniteError("training diverged")
            blob = method.reply(client, optimizer, end, len(shards[client]))
            _count(row, "uplink", method, blob)  # a refused reply has crossed the wire as well
            method.receive(blob)
        except (NonFiniteError, WireError) as err:
            rejected[client] = f"{type(err).__name__}: {err}"
    if len(rejected) == len(clients):
        raise TrainingError(f"no client gave a usable reply: {rejected}")
    method.close_round()


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
