"""The client: one step towards its point."""

from collections.abc import Callable

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from faults_app.task import PULL, goal, hold, initial, note
from gradcodec.integrations.flower import CompressMod, Participant, container


def spy(message: Message, context: Context, app: Callable[[Message, Context], Message]) -> Message:
    """Outermost: sees what crosses the wire."""
    (record,) = message.content.array_records.values()
    about = {
        "node": int(context.node_config["partition-id"]),
        "id": context.node_id,
        "run": context.run_id,
        "round": message.content["config"]["server-round"],
    }
    folder = str(context.run_config["folder"])
    knows = [name for name in context.state if context.state.array_records.get(name)]
    note(folder, what="received", packed=container.is_packed(record), knows=knows, **about)
    try:
        reply = app(message, context)
    except Exception as err:
        note(folder, what="raised", error=repr(err), **about)
        raise
    note(folder, what="replied", **about)
    return reply


app = ClientApp(mods=[spy, CompressMod()])


@app.train()
def train(message: Message, context: Context) -> Message:
    folder, node = str(context.run_config["folder"]), int(context.node_config["partition-id"])
    metrics = {"num-examples": 10, "train-loss": 0.0}
    if context.run_config["code-space"]:
        model = initial()
        participant = Participant(message, context, model)
        hold(folder, node)
        with torch.no_grad():
            model["w"].lerp_(goal(node), PULL)
        return participant.reply(metrics)
    hold(folder, node)
    w = torch.from_numpy(message.content["arrays"]["w"].numpy().copy()).lerp_(goal(node), PULL)
    content = {"arrays": ArrayRecord({"w": Array(w.numpy())}), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)
