"""The server: FedAvg, plain, over a compressing grid, or in code space."""

import json
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from gradcodec.federated import AutoConfig
from gradcodec.integrations.flower import CodecFedAvg, CodecGrid
from gradcodec.transforms.subspace.config import SubspaceConfig
from lora_1b.task import NODES, Task, load

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; report the distance after each."""
    settings = context.run_config
    task = Task()
    losses: list[float] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        load(task, {n: torch.from_numpy(a.numpy().copy()) for n, a in arrays.items()})
        losses.append(task.evaluate())
        return MetricRecord({"loss": losses[-1]})

    options = {"fraction_evaluate": 0.0, "min_available_nodes": NODES, "min_train_nodes": NODES}
    strategy = FedAvg(**options)
    if settings["codec"] == "subspace:auto":
        bases = SubspaceConfig(ratio=64, share="kind", basis_dtype="int4")
        config = AutoConfig(warmup_rounds=1, subspace=bases)
        strategy = CodecFedAvg("subspace:auto", config=config, **options)
    elif settings["codec"]:
        grid = CodecGrid(grid, str(settings["codec"]), str(settings["downlink"]))
    start = ArrayRecord({n: Array(p.detach().numpy().copy()) for n, p in task.parameters.items()})
    strategy.start(
        grid=grid, initial_arrays=start, num_rounds=int(settings["rounds"]), evaluate_fn=evaluate
    )
    Path(str(settings["report"])).write_text(json.dumps({"losses": losses}))
