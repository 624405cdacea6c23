"""The server: FedAvg as always over a grid that compresses; or FedAvg in the codec's space."""

import json
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flower_llama.task import NODES, load, task
from gradcodec.federated import AutoConfig
from gradcodec.integrations.flower import CodecFedAvg, CodecGrid
from gradcodec.transforms.subspace.config import SubspaceConfig

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Fine-tune for a few rounds; report the held-out loss after each."""
    settings = context.run_config
    here = task(int(settings["rounds"]), int(settings["steps"]))
    losses: list[float] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        load(here, {n: torch.from_numpy(a.numpy().copy()) for n, a in arrays.items()})
        losses.append(here.evaluate())
        return MetricRecord({"loss": losses[-1]})

    options = {"fraction_evaluate": 0.0, "min_available_nodes": NODES, "min_train_nodes": NODES}
    strategy = FedAvg(**options)
    if settings["codec"] == "subspace:auto":
        bases = SubspaceConfig(ratio=16, share="kind", basis_dtype="int4")
        config = AutoConfig(warmup_rounds=2, subspace=bases)
        strategy = CodecFedAvg("subspace:auto", config=config, **options)
    elif settings["codec"]:
        grid = CodecGrid(grid, str(settings["codec"]), str(settings["downlink"]))
    start = {n: Array(p.detach().numpy().copy()) for n, p in here.parameters.items()}
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(start),
        num_rounds=int(settings["rounds"]),
        evaluate_fn=evaluate,
    )
    if settings["report"]:
        Path(str(settings["report"])).write_text(json.dumps({"losses": losses}))
