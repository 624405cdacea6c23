"""Flower's simulation engine: many nodes take turns in one process, which must not mix them up."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")
pytest.importorskip("ray", reason="needs: pip install 'flwr[simulation]'")

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from integrations.flower_loopback import LoopbackGrid

from gradcodec.integrations.flower import CodecGrid, CompressMod

NODES, ROUNDS = 2, 4

pytestmark = pytest.mark.slow


def train(message: Message, context: Context) -> Message:
    """Towards a point of this node; the metrics say in which process."""
    rng = np.random.default_rng(int(context.node_config["partition-id"]))
    w = message.content["arrays"]["w"].numpy()
    w = w + np.float32(0.5) * (rng.normal(size=w.shape).astype(np.float32) - w)
    metrics = MetricRecord({"num-examples": 10})
    content = {"arrays": ArrayRecord({"w": Array(w)}), "metrics": metrics}
    return Message(RecordDict(content), reply_to=message)


def client() -> ClientApp:
    made = ClientApp(mods=[CompressMod()])
    made.train()(train)
    return made


def serve(grid: Grid) -> np.ndarray:
    """The model after the last round; signs with error feedback need each node's own state."""
    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=NODES)
    start = ArrayRecord({"w": Array(np.zeros((64, 64), np.float32))})
    coded = CodecGrid(grid, "sign", error_feedback=True)
    result = strategy.start(grid=coded, initial_arrays=start, num_rounds=ROUNDS)
    return result.arrays["w"].numpy()


def test_nodes_that_share_a_process_keep_their_own_state(tmp_path: Path, monkeypatch: Any) -> None:
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("FLWR_TELEMETRY_ENABLED", "0")):
        monkeypatch.setenv(name, value)
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        np.save(tmp_path / "simulated.npy", serve(grid))

    resources = {"client_resources": {"num_cpus": 1}, "init_args": {"num_cpus": 1}}  # one actor
    run_simulation(server, client(), NODES, backend_config=resources)
    simulated = np.load(tmp_path / "simulated.npy")
    assert np.abs(simulated).max() > 0.1
    assert np.array_equal(simulated, serve(LoopbackGrid(client, NODES)))
