"""Flower's simulation engine: many nodes take turns in one process, which must not mix them up.

One simulation runs every case, one after the other, since starting Ray takes most of the time. So
nodes also have the state of an earlier case when a later one begins.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")
pytest.importorskip("ray", reason="needs: pip install 'flwr[simulation]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from integrations.flower_loopback import LoopbackGrid

import gradcodec as gc
from gradcodec.federated import AutoConfig
from gradcodec.integrations.flower import CodecFedAvg, CodecGrid, CompressMod, Participant
from gradcodec.tgap import SecondMoments
from gradcodec.types import UpdateSpec

NODES, ROUNDS, SHAPE = 2, 5, (64, 64)
OPTIONS = {"fraction_evaluate": 0.0, "min_available_nodes": NODES}
IN_CODE_SPACE = {"auto", "folder in code space"}
CASES = ["signs with error feedback", "folder", "auto", "folder in code space"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def pulled(w: torch.Tensor, context: Context) -> torch.Tensor:
    """Half of the way to a point of this node."""
    goal = np.random.default_rng(context.node_id).normal(size=SHAPE).astype(np.float32)
    return w + 0.5 * (torch.from_numpy(goal) - w)


def train(message: Message, context: Context) -> Message:
    """One step, in code space or not, as the server says."""
    metrics = {"num-examples": 10}
    if message.content["config"]["case"] in IN_CODE_SPACE:
        model = {"w": torch.nn.Parameter(torch.zeros(SHAPE))}
        participant = Participant(message, context, model)
        with torch.no_grad():
            model["w"].copy_(pulled(model["w"], context))
        return participant.reply(metrics)
    w = pulled(torch.from_numpy(message.content["arrays"]["w"].numpy().copy()), context)
    content = {"arrays": ArrayRecord({"w": Array(w.numpy())}), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


def client() -> ClientApp:
    made = ClientApp(mods=[CompressMod()])
    made.train()(train)
    return made


def serve(case: str, grid: Grid, folder: str) -> np.ndarray:
    """The model after the last round."""
    strategy: FedAvg
    if case in IN_CODE_SPACE:
        auto = AutoConfig(warmup_rounds=2, subspace=gc.SubspaceConfig(ratio=2))
        strategy = CodecFedAvg("subspace:auto" if case == "auto" else folder, **OPTIONS)
        if case == "auto":
            strategy = CodecFedAvg("subspace:auto", config=auto, **OPTIONS)
    else:
        strategy = FedAvg(**OPTIONS)
        signs = case.startswith("signs")  # they need each node's own state
        chosen = ("sign", "int4") if signs else (folder, "int8")
        grid = CodecGrid(grid, *chosen, error_feedback=True if signs else None)
    start = ArrayRecord({"w": Array(np.zeros(SHAPE, np.float32))})
    told = ConfigRecord({"case": case})
    result = strategy.start(grid, start, num_rounds=ROUNDS, train_config=told)
    return result.arrays["w"].numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A codec that was fitted on something, in 8 bits."""
    torch.manual_seed(0)
    recorded = SecondMoments(UpdateSpec.of({"w": torch.zeros(SHAPE)}), gc.SubspaceConfig(ratio=2))
    for _ in range(8):
        recorded.add({"w": torch.randn(SHAPE)})
    path = tmp_path_factory.mktemp("codec") / "fitted"
    gc.Chain(gc.fit_subspace(recorded), gc.BlockQuant(gc.BlockQuantConfig(8))).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory, folder: str) -> Path:
    """A folder with the model of each case, and the nodes' ids."""
    path = tmp_path_factory.mktemp("simulated")
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        for case in CASES:
            np.save(path / f"{case}.npy", serve(case, grid, folder))
        (path / "nodes.json").write_text(json.dumps(list(grid.get_node_ids())))

    resources: Any = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 1}}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_USAGE_STATS_ENABLED", "FLWR_TELEMETRY_ENABLED"):
            patch.setenv(name, "0")
        run_simulation(server, client(), NODES, backend_config=resources)  # one actor
    return path


@pytest.mark.parametrize("case", CASES)
def test_nodes_that_share_a_process_keep_their_own_state(
    case: str, simulated: Path, folder: str
) -> None:
    model = np.load(simulated / f"{case}.npy")
    assert np.abs(model).max() > 0.1
    alone = LoopbackGrid(client, 0)
    ids = json.loads((simulated / "nodes.json").read_text())
    alone.contexts = {node: alone._context(node) for node in ids}
    assert np.array_equal(model, serve(case, alone, folder))
