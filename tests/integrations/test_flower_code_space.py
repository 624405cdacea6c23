"""Laws of ``CodecFedAvg`` and ``Participant``: a federation in code space, inside Flower."""

import logging
import os
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from federated.toy import CODECS, Toy, equal, subspace
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from integrations.flower_loopback import LoopbackGrid

import gradcodec as gc
from gradcodec import files
from gradcodec.errors import ConfigError
from gradcodec.federated import AutoConfig, Federation, LoopConfig, ServerConfig, server_for
from gradcodec.integrations.flower import CodecFedAvg, Participant, container
from gradcodec.transforms.subspace.config import SubspaceConfig

NODES, ROUNDS = 3, 6
AUTO = AutoConfig(
    warmup_rounds=2,
    subspace=SubspaceConfig(ratio=2, allocation="tempered"),
    refresh_rounds=(4,),
)


def app(shift: float = 0.0) -> Callable[[], ClientApp]:
    """Nodes that train ``Toy``; ``shift`` gives them another initial state."""

    def begin(message: Message, context: Context) -> tuple[Toy, Participant]:
        task = Toy()
        with torch.no_grad():
            for parameter in task.parameters.values():
                parameter += shift
        return task, Participant(message, context, task.parameters)

    def train(message: Message, context: Context) -> Message:
        task, participant = begin(message, context)
        optimizer = participant.optimizer(task.optimizer, **task.optimizer_options)
        number = int(message.content["config"]["server-round"]) - 1
        result = task.train(context.node_id, number, optimizer)
        return participant.reply({"num-examples": result.examples, "train-loss": result.loss})

    def evaluate(message: Message, context: Context) -> Message:
        task, participant = begin(message, context)
        return participant.reply({"num-examples": 1, "loss": task.evaluate()})

    def make() -> ClientApp:
        made = ClientApp()
        made.train()(train)
        made.evaluate()(evaluate)
        return made

    return make


def run(
    grid: LoopbackGrid,
    strategy: CodecFedAvg,
    rounds: int = ROUNDS,
    at: Callable[[int], None] = lambda number: None,
) -> dict[str, torch.Tensor]:
    """The server's state after the last round."""

    def watch(number: int, arrays: ArrayRecord) -> MetricRecord:
        at(number)
        return MetricRecord()

    initial = ArrayRecord({n: Array(t.numpy()) for n, t in Toy().initial.items()})
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds, evaluate_fn=watch)
    assert strategy.server is not None
    return strategy.server.replica.state()


def plain_loop(codec: Any, config: Any, downlink: Any = None) -> dict[str, torch.Tensor]:
    task = Toy()
    if codec == "subspace:auto":
        server = server_for(codec, task.initial, config)
    else:
        server = gc.federated.Server(task.initial, codec, downlink, config)
    nodes = [100 + i for i in range(NODES)]
    loop = LoopConfig(rounds=ROUNDS, clients=nodes, per_round=NODES)
    list(Federation(task, server, loop).run())
    return server.replica.state()


@pytest.mark.parametrize(
    ("codec", "config"),
    [
        ("int8", ServerConfig()),
        ("fp32", ServerConfig(momentum=0.5, lr=0.7)),
        ("int8", ServerConfig(representation="state")),
        ("rotsign", ServerConfig(relay=True, lr=0.7, max_norm=0.5)),
        ("rotsign", ServerConfig(relay=True, aggregation="trimmed", trim=0.3)),
        ("subspace:auto", AUTO),
    ],
    ids=["int8", "momentum", "absolute", "relay", "robust relay", "auto"],
)
def test_a_run_has_the_bits_of_the_plain_loop(codec: str, config: Any) -> None:
    ours = run(LoopbackGrid(app(), NODES), CodecFedAvg(codec, config=config))
    fixed = codec if codec == "subspace:auto" else gc.make_codec(codec)
    assert equal(ours, plain_loop(fixed, config))


def test_a_relay_with_a_downlink_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match="expected no downlink"):
        CodecFedAvg("rotsign", "int4", config=ServerConfig(relay=True))


def test_codes_of_a_fitted_codec_are_trained(tmp_path: Any) -> None:
    subspace().save_pretrained(tmp_path)
    config = ServerConfig(mode="latent")
    ours = run(LoopbackGrid(app(), NODES), CodecFedAvg(str(tmp_path), config=config))
    assert equal(ours, plain_loop(subspace(), config))


def test_auto_fits_its_codec_and_every_node_follows() -> None:
    strategy = CodecFedAvg("subspace:auto", config=AUTO)
    run(LoopbackGrid(app(), NODES), strategy)
    assert strategy.server is not None
    assert strategy.server.fits == 2  # type: ignore[attr-defined]


def test_no_message_holds_the_initial_state() -> None:
    grid = LoopbackGrid(app(), NODES)
    run(grid, CodecFedAvg("int8", fraction_evaluate=0.0), 1)
    empty = LoopbackGrid(app(), NODES)
    run(empty, CodecFedAvg("int8", fraction_evaluate=0.0), 2)
    first, later = (max(r["down"] for r in g.log[-NODES:]) for g in (grid, empty))
    assert first < later


def test_nodes_of_another_initial_state_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    grid = LoopbackGrid(app(), NODES)
    grid.apps[101] = app(shift=1.0)
    strategy = CodecFedAvg("int8")
    with caplog.at_level(logging.INFO):
        run(grid, strategy, 2)
    assert "node 101" in caplog.text
    assert "CodecMismatchError" in caplog.text
    assert strategy.server is not None
    assert strategy.server.round == 2


def test_a_modules_buffers_travel_bit_for_bit() -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        model.register_buffer("scale", torch.ones(3))
        return model

    def train(message: Message, context: Context) -> Message:
        model = build()
        participant = Participant(message, context, model)
        with torch.no_grad():
            model.scale += 0.1 * (context.node_id - 100)
            model[0].weight += 0.5
        return participant.reply({"num-examples": 5})

    def make() -> ClientApp:
        made = ClientApp()
        made.train()(train)
        return made

    strategy = CodecFedAvg("int4", initial=build(), fraction_evaluate=0.0)
    arrays = ArrayRecord({n: Array(t.numpy()) for n, t in build().state_dict().items()})
    strategy.start(grid=LoopbackGrid(make, 3), initial_arrays=arrays, num_rounds=1)
    assert strategy.server is not None
    scale = strategy.server.replica.state()["scale"]
    assert torch.allclose(scale, torch.full((3,), 1.1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("codec", ["int8", "subspace:auto"])
def test_a_lost_reply_costs_only_that_reply(codec: str) -> None:
    grid = LoopbackGrid(app(), NODES)
    failed: list[int] = []
    counted: list[int] = []

    def at(number: int) -> None:
        if number == 2:
            grid.lost.add(102)

    strategy = CodecFedAvg(codec, config=AUTO if codec == "subspace:auto" else None)
    received = strategy._received

    def counting(reply: Message) -> bool:
        good = received(reply)
        (counted if good else failed).append(reply.metadata.src_node_id)
        return good

    strategy._received = counting  # type: ignore[method-assign]
    run(grid, strategy, at=at)
    assert not failed
    assert len(counted) == NODES * ROUNDS - 1


@pytest.mark.parametrize("codec", ["int8", "subspace:auto"])
def test_a_node_that_lost_its_state_is_back_after_one_round(codec: str) -> None:
    grid = LoopbackGrid(app(), NODES)
    errors: list[str] = []

    def at(number: int) -> None:
        if number == 3:
            grid.forget(101)

    def note(node: int, reply: Message) -> None:
        if reply.has_error():
            errors.append(f"{node}: {reply.error.reason}")

    grid.damage = note
    config = AUTO if codec == "subspace:auto" else None
    run(grid, CodecFedAvg(codec, config=config, fraction_evaluate=0.0), at=at)
    assert len(errors) == 1
    assert "101: CodecMismatchError" in errors[0]


def test_a_damaged_reply_costs_that_reply(caplog: pytest.LogCaptureFixture) -> None:
    grid = LoopbackGrid(app(), NODES)

    def damage(node: int, reply: Message) -> None:
        if node == 101 and not reply.has_error() and "arrays" in reply.content:
            parts = container.unpacked(reply.content["arrays"])
            blob = bytearray(parts["reply"])
            blob[len(blob) // 2] ^= 1
            reply.content["arrays"] = container.packed({"reply": bytes(blob)})

    grid.damage = damage
    strategy = CodecFedAvg("int8")
    run(grid, strategy, 2)
    assert "dropped the reply of node 101" in caplog.text
    assert strategy.server is not None
    assert strategy.server.round == 2


@pytest.mark.parametrize("how", ["container", "envelope"])
def test_a_node_of_another_wire_version_is_left_out(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    grid = LoopbackGrid(app(), NODES)

    def damage(node: int, reply: Message) -> None:
        if node != 101 or reply.has_error() or "arrays" not in reply.content:
            return
        array = reply.content["arrays"][container.KEY]
        if how == "envelope":
            blob = container.unpacked(reply.content["arrays"])["reply"]
            blob = blob[:2] + b"\x03" + blob[3:-4]
            blob += (~zlib.crc32(blob) & 0xFFFFFFFF).to_bytes(4, "little")
            reply.content["arrays"] = container.packed({"reply": blob})
        else:
            old = Array("uint8", array.shape, "gradcodec.0", array.data)
            reply.content["arrays"] = ArrayRecord({container.KEY: old})

    grid.damage = damage
    strategy = CodecFedAvg("int8", fraction_evaluate=0.0)
    run(grid, strategy, 2)
    told = [r.message for r in caplog.records if "dropped the reply of node 101" in r.message]
    assert len(told) == 2
    assert all("UnsupportedVersionError" in text for text in told)
    assert strategy.server is not None
    assert strategy.server.round == 2


def test_a_restarted_server_takes_its_nodes_back_to_the_start() -> None:
    grid = LoopbackGrid(app(), NODES)
    run(grid, CodecFedAvg("int8"), 2)
    again = run(grid, CodecFedAvg("int8"), ROUNDS)
    assert equal(again, run(LoopbackGrid(app(), NODES), CodecFedAvg("int8"), ROUNDS))


@pytest.mark.parametrize("codec", ["int8", "subspace:auto"])
def test_another_run_goes_on_from_the_checkpoint_to_the_bits_of_a_whole_one(
    codec: str, tmp_path: Path
) -> None:
    config = AUTO if codec == "subspace:auto" else ServerConfig(momentum=0.5)
    whole = run(LoopbackGrid(app(), NODES), CodecFedAvg(codec, config=config))
    path = tmp_path / "server.safetensors"
    rounds: list[int] = []
    for until in (3, ROUNDS):
        grid = LoopbackGrid(app(), NODES)  # of another run: nodes know nothing
        strategy = CodecFedAvg(codec, config=config, checkpoint=path)
        after = run(grid, strategy, until, at=rounds.append)
    assert rounds == [0, 1, 2, 3, 3, 4, 5, 6]
    assert equal(whole, after)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "server.safetensors"
    run(LoopbackGrid(app(), NODES), CodecFedAvg("int8", checkpoint=path), 1)
    with pytest.raises(ConfigError, match="not a checkpoint of this federation"):
        run(LoopbackGrid(app(), NODES), CodecFedAvg("int4", checkpoint=path), 2)


def test_a_second_start_goes_on_and_does_not_begin_elsewhere_silently() -> None:
    grid, strategy = LoopbackGrid(app(), NODES), CodecFedAvg("int8")
    half = ArrayRecord({n: Array(t.numpy()) for n, t in run(grid, strategy, 3).items()})
    with pytest.raises(ConfigError, match="those that the last start ended with"):
        run(grid, strategy, 3)
    strategy.start(grid, half, num_rounds=1)
    assert strategy.server is not None
    assert strategy.server.round == 4


def test_clients_without_a_participant_are_said_to_need_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def plain(message: Message, context: Context) -> Message:
        message.content["arrays"].to_numpy_ndarrays()
        raise AssertionError

    def make() -> ClientApp:
        made = ClientApp()
        made.train()(plain)
        return made

    run(LoopbackGrid(make, NODES), CodecFedAvg("int8", fraction_evaluate=0.0), 1)
    assert "no reply of round 1 can be used" in caplog.text
    assert "Participant" in caplog.text


def test_initial_arrays_that_training_would_not_begin_with_are_refused() -> None:
    strategy = CodecFedAvg("int8", initial={n: t + 1 for n, t in Toy().initial.items()})
    with pytest.raises(ConfigError, match="expected initial_arrays equal to those of initial="):
        run(LoopbackGrid(app(), NODES), strategy, 1)


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from gradcodec.integrations.flower import CodecFedAvg
from integrations.flower_loopback import LoopbackGrid
from integrations.test_flower_code_space import NODES, app, run

path = Path(sys.argv[1]) / "server.safetensors"
run(LoopbackGrid(app(), NODES), CodecFedAvg("int8", checkpoint=path), 2)
(path.parent / "before").write_bytes(path.read_bytes())
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # no file may grow further, as on a full disk
try:
    run(LoopbackGrid(app(), NODES), CodecFedAvg("int8", checkpoint=path), 3)
except OSError as err:
    raise SystemExit(7 if str(path) in str(err) else 1)
"""


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    tests = str(Path(__file__).parents[1])
    script = [sys.executable, "-c", FULL_DISK, str(tmp_path), tests]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, capture_output=True, text=True, timeout=100, env=env, check=False)
    assert done.returncode == 7, done.stderr
    assert (tmp_path / "server.safetensors").read_bytes() == (tmp_path / "before").read_bytes()
    assert not [p.name for p in tmp_path.iterdir() if files.is_temporary(p.name)]


def test_latent_rounds_need_the_participants_optimizer() -> None:
    grid = LoopbackGrid(app(), 1)
    reasons: list[str] = []

    def forgetful(message: Message, context: Context) -> Message:
        return Participant(message, context, Toy().parameters).reply({"num-examples": 1})

    def make() -> ClientApp:
        made = ClientApp()
        made.train()(forgetful)
        return made

    grid.make_app = make
    grid.damage = lambda node, reply: reasons.append(reply.error.reason)
    options = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0.0}
    strategy = CodecFedAvg("int8", config=ServerConfig(mode="latent"), **options)
    run(grid, strategy, 1)
    assert "Participant.optimizer" in reasons[0]


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("subspace:auto", {"downlink": "int8"}),
        ("subspace:auto", {"config": ServerConfig()}),
        ("int8", {"config": AutoConfig()}),
        (7, {}),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(codec: Any, options: Any) -> None:
    with pytest.raises(ConfigError):
        CodecFedAvg(codec, **options)


@pytest.mark.parametrize("name", CODECS)
def test_a_clients_snapshot_brings_a_new_client_to_its_state(name: str) -> None:
    codec, initial = CODECS[name], Toy().initial
    server = gc.federated.Server(initial, codec)
    client = server.client(7)
    for number in range(3):
        client.receive(server.broadcast(client.version))
        moved = {n: t + 0.01 * (number + 1) * np.sign(number - 1) for n, t in initial.items()}
        server.receive(client.reply(moved, 4))
        server.close_round()
        other = server.client(7)
        other.receive(client.snapshot())
        assert equal(other.replica.state(), client.replica.state())
        assert other.version == client.version
        # The same bytes lead both on.
        blob = server.broadcast(client.version)
        assert equal(other.receive(blob), client.receive(blob))
