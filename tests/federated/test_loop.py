"""Laws of the whole loop: nothing is lost or added by it, and every byte is counted."""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from federated.toy import BIAS, CODECS, Toy, autoencoder, bent, equal, quantised, subspace, timeless
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.codecs import Identity
from gradcodec.errors import ConfigError, TrainingError
from gradcodec.federated.collect import collect
from gradcodec.federated.config import ServerConfig
from gradcodec.federated.envelope import Broadcast, Reply
from gradcodec.federated.loop import Federation, LoopConfig, RoundReport
from gradcodec.federated.participants import ClientId
from gradcodec.federated.server import Server
from gradcodec.tgap.recorder import GradientRecorder
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.wire import Payload

LATENT = ServerConfig(mode="latent")


class Spy(Server):
    """Keeps every message; damages the replies of ``corrupt`` on their way."""

    corrupt: Sequence[int] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.up: list[bytes] = []
        self.down: list[bytes] = []

    def receive(self, blob: bytes, *, sender: ClientId | None = None) -> Reply:
        if Reply.from_bytes(blob).client in self.corrupt:
            blob = blob[:40] + bytes([blob[40] ^ 1]) + blob[41:]
        self.up.append(blob)
        return super().receive(blob, sender=sender)

    def broadcast(self, version: int = 0) -> bytes:
        self.down.append(super().broadcast(version))
        return self.down[-1]


@dataclass(frozen=True)
class Sampled(LoopConfig):
    """Who takes part, written down."""

    plan: tuple[tuple[int, ...], ...] = ()

    def sample(self, round: int) -> list[int]:
        return list(self.plan[round])


def federation(
    codec: Codec | None = None,
    config: ServerConfig | None = None,
    *,
    task: Toy | None = None,
    loop: LoopConfig | None = None,
    downlink: Codec | None = None,
) -> Federation:
    task = task or Toy()
    server = Spy(task.initial, codec or Identity(), downlink, config)
    return Federation(task, server, loop or LoopConfig(5, range(6), 3, seed=1))


def run(*args: Any, **kwargs: Any) -> tuple[Federation, list[RoundReport]]:
    made = federation(*args, **kwargs)
    return made, list(made.run())


# -- no codec ------------------------------------------------------------------------------------


def vector(parameters: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in parameters.values()])


@torch.no_grad()
def load(task: Toy, v: Tensor) -> None:
    torch.nn.utils.vector_to_parameters(v.clone(), task.parameters.values())


def plain_fedavg(task: Toy, config: LoopConfig, what: str) -> tuple[Tensor, list[float]]:
    """Federated averaging (McMahan et al.) with no codec, no message and no server class.

    The global model is ``initial + sum of mean updates`` or the mean of states, in fp32; means are
    exact, so that clients may come in any order.
    """
    initial = vector(task.parameters)
    moved, state, losses = torch.zeros_like(initial), initial, []
    for number in range(config.rounds):
        examples, sent = [], []
        for client in config.sample(number):
            load(task, state)
            optimizer = task.optimizer(list(task.parameters.values()), **task.optimizer_options)
            examples.append(task.train(client, number, optimizer).examples)
            end = vector(task.parameters)
            sent.append(end - state if what == "update" else end)
        # Exactly, then rounded: each value's products and their sum in fp64.
        products = [v.double() * count for v, count in zip(sent, examples, strict=True)]
        sums = [math.fsum(column) for column in torch.stack(products).T.tolist()]
        mean = (torch.tensor(sums, dtype=torch.float64) / sum(examples)).float()
        if what == "update":
            moved = moved + mean
            state = initial + moved
        else:
            state = mean
        load(task, state)
        losses.append(task.evaluate())
    return state, losses


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("what", ["update", "state"])
def test_identity_pipeline_is_bitwise_equal_to_no_codec(
    what: str, optimizer: type[torch.optim.Optimizer]
) -> None:
    loop = LoopConfig(6, range(6), 4, seed=3)
    config = ServerConfig(representation=what)
    made, reports = run(Identity(), config, task=Toy(optimizer=optimizer), loop=loop)
    state, losses = plain_fedavg(Toy(optimizer=optimizer), loop, what)
    assert torch.equal(vector(made.task.parameters), state)
    assert [r.loss for r in reports] == losses
    assert losses[-1] < 0.9 * losses[0]
    assert all(r.snr_db == r.mean_snr_db == torch.inf for r in reports)


# -- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("what", ["latent", "update", "state", "balanced"])
def test_reported_bytes_are_the_lengths_of_real_messages(codec: str, what: str) -> None:
    config = LATENT if what == "latent" else ServerConfig(representation=what)
    made, reports = run(CODECS[codec], config)
    spy = made.server
    assert isinstance(spy, Spy)
    assert sum(r.uplink_bytes for r in reports) == sum(map(len, spy.up))
    assert sum(r.downlink_bytes for r in reports) == sum(map(len, spy.down))
    assert len(spy.up) == len(spy.down) == 15
    bodies = [len(Reply.from_bytes(b).payload.body) for b in spy.up]
    assert sum(r.uplink_payload_bytes for r in reports) == sum(bodies)
    parts = [p for b in spy.down for _, p in Broadcast.from_bytes(b).parts]
    below = sum(len(Payload.from_bytes(p).body) for p in parts)
    assert sum(r.downlink_payload_bytes for r in reports) == below
    # Known before encoding; around it: 11 or 12 (client 0 takes no byte) + 25 + a varint.
    size = made.server.uplink.nbytes() + 25 + (1 if made.server.uplink.nbytes() < 128 else 2)
    assert {len(b) for b in spy.up} == {size + 11, size + 12}


def test_refused_replies_are_counted_too() -> None:
    made = federation()
    made.server.corrupt = [made.config.sample(0)[0]]  # type: ignore[attr-defined]
    report = made.step()
    assert len(report.rejected) == 1
    assert report.uplink_bytes == sum(map(len, made.server.up))  # type: ignore[attr-defined]


# -- clients that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", [ServerConfig(), LATENT], ids=["post", "latent"])
@pytest.mark.parametrize(
    ("behaviour", "error"), [("nan", "NonFiniteError"), ("empty", "EmptyClientError")]
)
def test_a_failing_client_costs_its_reply_only(
    config: ServerConfig, behaviour: str, error: str
) -> None:
    # In latent mode parameters are written by the optimiser; what diverges there is the code.
    optimizer = {"lr": float("nan")} if (behaviour, config.mode) == ("nan", "latent") else {}

    class Failing(Toy):
        def train(self, client: int, round: int, optimizer_: torch.optim.Optimizer) -> Any:
            if client == 2 and optimizer:
                optimizer_.param_groups[0]["lr"] = optimizer["lr"]
            return super().train(client, round, optimizer_)

    loop = LoopConfig(3, range(4), 4)
    behaviours = {} if optimizer else {2: behaviour}
    made, reports = run(subspace(), config, task=Failing(behaviours), loop=loop)
    for r in reports:
        assert r.participants == [0, 1, 3]
        assert list(r.rejected) == [2]
        assert r.rejected[2].startswith(error + ": ")
    without = LoopConfig(3, [0, 1, 3], 3)
    alone, others = run(subspace(), config, loop=without)
    assert equal(made.server.replica.state(), alone.server.replica.state())
    assert [r.loss for r in reports] == [r.loss for r in others]


def test_a_corrupted_reply_costs_one_reply() -> None:
    loop = LoopConfig(3, range(4), 4)
    made = federation(quantised(), loop=loop)
    made.server.corrupt = (1,)  # type: ignore[attr-defined]
    reports = list(made.run())
    for r in reports:
        assert r.participants == [0, 2, 3]
        assert r.rejected[1].startswith("ChecksumError: ")
    alone, _ = run(quantised(), loop=LoopConfig(3, [0, 2, 3], 3))
    assert equal(made.server.replica.state(), alone.server.replica.state())


def test_a_round_of_bad_clients_only_is_a_training_error() -> None:
    behaviour = dict.fromkeys(range(6), "nan") | {4: "empty"}
    made = federation(task=Toy(behaviour))
    initial = Toy().initial
    with pytest.raises(TrainingError, match=r"round 0: no client.*NonFiniteError"):
        made.step()
    assert (made.finished, made.server.round) == (0, 0)
    assert equal(made.server.replica.state(), initial)


def test_earlier_rounds_survive_a_failing_one() -> None:
    task = Toy()
    made = federation(task=task)
    reports = [made.step(), made.step()]
    before = made.server.replica.state()
    task.behaviour = dict.fromkeys(range(6), "nan")
    with pytest.raises(TrainingError):
        made.step()
    assert len(reports) == made.finished == made.server.round == 2
    assert equal(made.server.replica.state(), before)
    task.behaviour = {}
    assert made.step().round == 2


# -- clients that come and go ----------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("what", ["latent", "update", "state"])
def test_a_client_seen_once_in_twenty_rounds_catches_up_bitwise(codec: str, what: str) -> None:
    config = LATENT if what == "latent" else ServerConfig(representation=what)
    plan = ((0, 9), *[(0, 1)] * 19, (0, 9))
    loop = Sampled(21, range(10), 2, plan=plan)
    made = federation(CODECS[codec], config, loop=loop)
    for _ in range(20):
        made.step()
    global_state = made.server.replica.state()
    made.step()
    late, regular = made.clients[9].replica, made.clients[0].replica
    assert (late.version, regular.version) == (20, 20)
    assert torch.equal(late.position, regular.position)
    assert equal(late.state(), global_state)
    assert equal(regular.state(), global_state)
    sizes = [len(b) for b in made.server.down]  # type: ignore[attr-defined]
    assert sizes[-1] < 20 * sizes[-2]  # one vector, not all that was missed


@pytest.mark.parametrize("config", [ServerConfig(), LATENT], ids=["post", "latent"])
@pytest.mark.parametrize(
    "codec", [subspace(), quantised(), autoencoder(), bent()], ids=lambda c: type(c).__name__
)
def test_the_same_seed_gives_the_same_run(codec: Codec, config: ServerConfig) -> None:
    runs = [run(codec, config) for _ in range(2)]
    assert timeless(runs[0][1]) == timeless(runs[1][1])
    assert runs[0][0].server.increments == runs[1][0].server.increments


def test_another_seed_gives_another_run() -> None:
    samples = [[LoopConfig(5, range(20), 3, seed=s).sample(r) for r in range(5)] for s in (0, 1)]
    assert samples[0] != samples[1]
    assert all(len(set(s)) == 3 and s == sorted(s) for row in samples for s in row)


@pytest.mark.parametrize("config", [ServerConfig(), LATENT], ids=["post", "latent"])
def test_clients_may_take_different_numbers_of_steps(config: ServerConfig) -> None:
    taken: dict[int, int] = {}

    class Counting(Toy):
        def train(self, client: int, round: int, optimizer: torch.optim.Optimizer) -> Any:
            calls = [0]
            handle = optimizer.register_step_post_hook(
                lambda *_: calls.__setitem__(0, calls[0] + 1)
            )
            result = super().train(client, round, optimizer)
            handle.remove()
            taken[client] = calls[0]
            return result

    loop = LoopConfig(8, range(3), 3)
    _, reports = run(subspace(0.75), config, task=Counting(), loop=loop)
    assert taken == {0: 2, 1: 3, 2: 4}
    assert reports[-1].loss < reports[0].loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_trained_and_sent(dtype: torch.dtype) -> None:
    made, reports = run(Identity(), task=Toy(dtype=dtype))
    assert {t.dtype for t in made.server.replica.state().values()} == {dtype}
    assert reports[-1].loss < reports[0].loss


@pytest.mark.parametrize(
    "options", [{"rounds": 0}, {"per_round": 0}, {"per_round": 7}, {"clients": ()}]
)
def test_impossible_loops_are_refused(options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"rounds": 2, "clients": range(6), "per_round": 3, **options}
    with pytest.raises(ConfigError, match="expected rounds"):
        LoopConfig(**settings)


# -- TGAP's gathering ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["federated", "local"])
def test_gathering_watches_every_client_and_puts_parameters_back(how: str) -> None:
    task, told = Toy(), []
    initial = task.initial
    recorder = GradientRecorder(task.parameters, SubspaceConfig(ratio=2))
    loop = LoopConfig(3, range(4), 2, seed=5)
    gathered = collect(task, lambda: recorder, loop, how, lambda done, of: told.append((done, of)))
    assert equal(task.initial, initial)
    clients = [c for r in range(3) for c in loop.sample(r)]
    if how == "local":
        clients = sorted(set(clients)) * 3
        assert gathered.uplink_bytes == gathered.downlink_bytes == 0
        assert gathered.final_loss is None
    else:
        assert gathered.uplink_bytes > gathered.downlink_bytes > 0
        assert told == [(1, 3), (2, 3), (3, 3)]
    assert recorder.steps == sum(2 + c % 3 for c in clients)
    assert told[-1][0] == told[-1][1]


def test_an_unknown_reading_is_named() -> None:
    with pytest.raises(ConfigError, match="'global'"):
        collect(Toy(), nullcontext, LoopConfig(1, range(2), 1), "global")


def test_toy_has_a_vector_and_learns_it() -> None:
    made, _ = run(Identity())
    assert made.task.parameters[BIAS].ndim == 1
    assert bool(made.task.parameters[BIAS].any())


def test_clients_may_have_names_and_survive_a_trip_through_json() -> None:
    names: list[Any] = ["a", 2**63, "b", 7]

    class Named(Toy):
        def train(self, client: Any, round: int, optimizer: torch.optim.Optimizer) -> Any:
            return super().train(names.index(client), round, optimizer)

    made = federation(task=Named(), loop=LoopConfig(2, names, 3, seed=1))
    made.server.corrupt = ["a"]  # type: ignore[attr-defined]
    for report in made.run():
        again = RoundReport.from_dict(json.loads(json.dumps(report.to_dict())))
        assert again == report
        assert set(report.participants) | set(report.rejected) == set(
            made.config.sample(report.round)
        )


def test_a_dropped_reply_is_reported() -> None:
    class Loud(Toy):
        def train(self, client: int, round: int, optimizer: torch.optim.Optimizer) -> Any:
            result = super().train(client, round, optimizer)
            if client == 2:
                with torch.no_grad():
                    self.parameters[BIAS].fill_(3e38)
            return result

    config = ServerConfig(aggregation="sum")
    loop = Sampled(2, range(4), 3, plan=((0, 1, 2), (0, 1, 2)))
    made = federation(task=Loud(), config=config, loop=loop)
    made.server.residual = torch.full_like(made.server.residual, 1e38)
    report = made.step()
    assert (report.participants, list(report.rejected)) == ([0, 1], [2])
    assert "infinite" in report.rejected[2]
