"""The client: ordinary training code, and one mod; or training in the codec's space."""

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_llama.task import load, task
from gradcodec.integrations.flower import CompressMod, Participant

app = ClientApp(mods=[CompressMod()])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the adapters on this node's examples."""
    settings = context.run_config
    here = task(int(settings["rounds"]), int(settings["steps"]))
    if settings["codec"] == "subspace:auto":
        return train_in_code_space(message, context)
    load(
        here, {n: torch.from_numpy(a.numpy().copy()) for n, a in message.content["arrays"].items()}
    )
    optimizer = torch.optim.AdamW(list(here.parameters.values()), **here.optimizer_options)
    result = here.train(*place(message, context), optimizer)
    arrays = {n: Array(p.detach().numpy()) for n, p in here.parameters.items()}
    metrics = MetricRecord({"num-examples": result.examples, "train-loss": result.loss})
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
    return Message(content, reply_to=message)


def train_in_code_space(message: Message, context: Context) -> Message:
    """The same for a server whose strategy is ``CodecFedAvg``."""
    here = task(int(context.run_config["rounds"]), int(context.run_config["steps"]))
    participant = Participant(message, context, here.parameters)
    optimizer = participant.optimizer(here.optimizer, **here.optimizer_options)
    result = here.train(*place(message, context), optimizer)
    return participant.reply({"num-examples": result.examples, "train-loss": result.loss})


def place(message: Message, context: Context) -> tuple[int, int]:
    """Which part of the data is here, and the number of the round."""
    number = int(message.content["config"]["server-round"]) - 1
    return int(context.node_config["partition-id"]), number
