"""The client: ordinary training code, and one mod."""

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_llama.task import load, task
from gradcodec.integrations.flower import CompressMod

app = ClientApp(mods=[CompressMod()])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the adapters on this node's examples."""
    settings = context.run_config
    here = task(int(settings["rounds"]), int(settings["steps"]))
    load(
        here, {n: torch.from_numpy(a.numpy().copy()) for n, a in message.content["arrays"].items()}
    )
    optimizer = torch.optim.AdamW(list(here.parameters.values()), **here.optimizer_options)
    number = int(message.content["config"]["server-round"]) - 1
    result = here.train(int(context.node_config["partition-id"]), number, optimizer)
    arrays = {n: Array(p.detach().numpy()) for n, p in here.parameters.items()}
    metrics = MetricRecord({"num-examples": result.examples, "train-loss": result.loss})
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
    return Message(content, reply_to=message)
