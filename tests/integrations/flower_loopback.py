"""A grid in this process: messages really become bytes and back, and each meets a fresh mod.

As in a deployment, a node's ``Context`` is all that lives from message to message, an exception in
the app becomes an error reply, and only bytes pass between server and node.
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1

App = Callable[[Message, Context], Message]


class LoopbackGrid(Grid):
    """Nodes 100, 101, ...; ``apps[node]`` may replace the app of one of them.

    Attributes:
        log: node, bytes down, bytes up and objects up of each message, in order.
        lost: nodes whose next reply does not arrive.
        damage: changes a reply's content before it is sent.
    """

    def __init__(self, make_app: Callable[[], App], nodes: int) -> None:
        self.make_app = make_app
        self.apps: dict[int, Callable[[], App]] = {}
        self.log: list[dict[str, int]] = []
        self.lost: set[int] = set()
        self.damage: Callable[[int, Message], None] = lambda node, reply: None
        self.contexts = {100 + i: self._context(100 + i) for i in range(nodes)}
        self._pending: dict[str, Message] = {}

    def _context(self, node: int) -> Context:
        return Context(1, node, {"partition-id": node - 100}, RecordDict(), {})

    def forget(self, node: int) -> None:
        """The node's state is gone, as after a reinstallation."""
        self.contexts[node] = self._context(node)

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__.update(_run_id=1, _src_node_id=1)
            message.metadata.__dict__["_message_id"] = message.object_id
            ids.append(message.metadata.message_id)
            self._pending[message.metadata.message_id] = message
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies = []
        for message_id in message_ids:
            message = self._pending.pop(message_id)
            node = message.metadata.dst_node_id
            there, down, _ = over_the_wire(message)
            try:
                reply = self.apps.get(node, self.make_app)()(there, self.contexts[node])
            except Exception as err:
                reply = Message(Error(2, repr(err)), reply_to=there)
            self.damage(node, reply)
            back, up, objects = over_the_wire(reply)
            self.log.append({"node": node, "down": down, "up": up, "objects": objects})
            if node in self.lost:
                self.lost.discard(node)
            else:
                replies.append(back)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))


def over_the_wire(message: Message) -> tuple[Message, int, int]:
    """What arrives, the bytes of its objects, and how many objects there are."""
    message_id = message.object_id
    objects = {k: o.deflate() for k, o in get_all_nested_objects(message).items()}
    arrived = inflate_object_from_contents(message_id, dict(objects))
    arrived.metadata.__dict__["_message_id"] = message_id
    return arrived, sum(map(len, objects.values())), len(objects)
