"""The server: goes on from its checkpoint, if there is one."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from faults_app.task import error, initial, note
from gradcodec.integrations.flower import CodecFedAvg, CodecGrid

app = ServerApp()


class Impatient(CodecGrid):
    """Waits for the replies of one round for so long only, however slow the machine is.

    Attributes:
        number: of the round.
    """

    number = 0
    seconds = 25.0

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        sent = list(messages)
        rounds = {message.content["config"]["server-round"] for message in sent}
        waits = self.seconds if self.number in rounds else timeout
        return super().send_and_receive(sent, timeout=waits)


@app.main()
def main(grid: Grid, context: Context) -> None:
    settings = context.run_config
    folder, rounds = str(settings["folder"]), int(settings["rounds"])
    options = {"fraction_evaluate": 0.0, "min_available_nodes": 2, "min_train_nodes": 2}
    code_space = bool(settings["code-space"])
    kept = Path(folder) / "model.npz"
    start, before = initial()["w"].detach().numpy(), 0
    if kept.exists() and not code_space:
        with np.load(kept) as found:
            start, before = found["w"], int(found["done"])

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        w = arrays["w"].numpy()
        done = before + number
        np.savez(kept.with_suffix(".part.npz"), w=w, done=done)
        kept.with_suffix(".part.npz").replace(kept)
        note(folder, what="round", run=context.run_id, done=done, error=error(torch.tensor(w)))
        return MetricRecord({"error": error(torch.tensor(w))})

    strategy: FedAvg
    if code_space:
        # Nodes build the initial state themselves, so the strategy resumes, not its arrays.
        path = Path(folder) / "server.safetensors"
        strategy = CodecFedAvg("int8", checkpoint=path, **options)
    else:
        strategy, grid = FedAvg(**options), Impatient(grid, "int4")
        grid.number = int(settings["impatient"])
    arrays = ArrayRecord({"w": Array(start)})
    strategy.start(
        grid=grid,
        initial_arrays=arrays,
        num_rounds=rounds - before,
        evaluate_fn=evaluate,
    )
    note(folder, what="finished", run=context.run_id)
