"""The client: one step towards the node's point."""

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from gradcodec.integrations.flower import CompressMod, Participant
from lora_1b.task import LR, Task, load

app = ClientApp(mods=[CompressMod()])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train and reply, in whichever way the server has chosen."""
    torch.set_num_threads(1)
    task, node = Task(), int(context.node_config["partition-id"])
    metrics = {"num-examples": 10, "train-loss": 0.0}
    if context.run_config["codec"] == "subspace:auto":
        participant = Participant(message, context, task.parameters)
        step(task, node, participant.optimizer(torch.optim.SGD, lr=LR))
        return participant.reply(metrics)
    load(
        task, {n: torch.from_numpy(a.numpy().copy()) for n, a in message.content["arrays"].items()}
    )
    step(task, node, torch.optim.SGD(task.parameters.values(), lr=LR))
    arrays = ArrayRecord({n: Array(p.detach().numpy()) for n, p in task.parameters.items()})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)


def step(task: Task, node: int, optimizer: torch.optim.Optimizer) -> None:
    """One step."""
    optimizer.zero_grad()
    task.loss(node).backward()
    optimizer.step()
