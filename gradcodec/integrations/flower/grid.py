"""The server's side: a grid that encodes the model and decodes replies, whatever the strategy."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from gradcodec import layout
from gradcodec.errors import CodecMismatchError, ConfigError, GradcodecError
from gradcodec.integrations.flower import container
from gradcodec.integrations.flower.mod import SETTINGS, VERSION, offered
from gradcodec.integrations.flower.node import BASE
from gradcodec.integrations.messages.choice import codec_of, plain_choice, plain_rules
from gradcodec.integrations.messages.coding import Coding
from gradcodec.integrations.messages.copies import Copy, Sender
from gradcodec.settings import CodecConfig, check_one_of
from gradcodec.types import Update, UpdateSpec

logger = logging.getLogger(__name__)

BAD_REPLY = 900
"""The code of the ``Error`` that takes the place of a reply that cannot be decoded."""


@dataclass(frozen=True)
class _Sent:
    """A message that waits for its reply.

    Attributes:
        message: as it was sent.
        model: the strategy's, of which its receiver has a copy.
        version: of this copy.
        coded: whether only a node with the mod can have read it.
    """

    message: Message
    model: dict[str, Tensor]
    version: bytes
    coded: bool


class CodecGrid(Grid):
    """A grid that compresses both directions, for every strategy and for hand-written loops.

        strategy.start(grid=CodecGrid(grid, "int4"), initial_arrays=arrays, num_rounds=10)

    Clients need ``CompressMod``; one without it is sent plain arrays and answers plainly, and takes
    part as always. A strategy sees plain arrays: the model that it has sent, plus the decoded
    update; not what coding made of the model on its way, since the difference is no client's work,
    and strategies with momentum or adaptive rates would take it for a gradient.

    The first message to a node holds the whole model, in plain arrays. Later ones hold how it has
    changed since, in one array: the difference to what the node has, so that what coding one of
    them lost is in the next. A node that missed rounds gets the increments that it lacks, or, with
    ``per_node``, one difference, coded for it alone. A node that has lost its state answers with an
    error, and is sent the whole model next time.

    A reply that cannot be decoded costs that reply: it becomes an ``Error``, which strategies
    leave out, and a log line names the node. The grid's state is in this object: after a restart
    of the ``ServerApp`` nodes are sent the whole model again.

    Messages with one ``ArrayRecord`` that holds floating-point arrays are coded, others pass as
    they are. Where that, or a reply in plain arrays, means that nothing is compressed, a log line
    says so once.

    Args:
        grid: the grid that Flower gives to the ``ServerApp``.
        codec: of replies: a codec's name, the config of one without weights, a folder, or a Hub id.
        downlink: of models, likewise; its error must be smaller than its input.
        error_feedback: whether a node adds what coding lost to its next update; ``None`` decides
            by codec. Where a node takes part in few rounds, ``False`` is the better choice.
        rules: ``(pattern, codec name)`` by tensor name, the first match wins. Integers and
            BatchNorm's statistics need no rule: they travel bit for bit.
        per_node: whether each node gets the difference to what it holds itself. That costs the same
            however many rounds it missed, where increments cost as much for each of them; the
            server then keeps a copy of the model for each node. For federations that sample few
            nodes a round. Randomised per worker in the same way: Rand-MCM (arXiv 2102.12528), which
            codes the model's difference to a memory of the worker's.

    Raises:
        ConfigError: an argument is of another kind, ``grid`` is a ``CodecGrid`` itself, or
            ``downlink`` cannot be used; with the first model, a rule matches none of its tensors.
        UpdateError: with the first model, a fitted codec is of other tensors.
        HubError: there is no such codec.
    """

    def __init__(
        self,
        grid: Grid,
        codec: str | CodecConfig | Mapping[str, Any],
        downlink: str | CodecConfig | Mapping[str, Any] = "int4",
        *,
        error_feedback: bool | None = None,
        rules: Sequence[Sequence[str]] = (),
        per_node: bool = False,
    ) -> None:
        if isinstance(grid, CodecGrid):
            raise ConfigError(
                "expected the grid that Flower gives to the ServerApp, got a CodecGrid"
            )
        self._choice = {
            "uplink": plain_choice(codec),
            "downlink": plain_choice(downlink),
            "rules": plain_rules(rules),
            "feedback": error_feedback,
        }
        self._rules = tuple((pattern, name) for pattern, name in plain_rules(rules))
        self._codecs = [codec_of(plain_choice(one)) for one in (codec, downlink)]
        self._grid = grid
        self._held: dict[int, bytes] = {}
        self._senders: dict[int | None, Sender] = {}
        check_one_of("CodecGrid", "per_node", per_node, (True, False))
        self._per_node = per_node
        self._agree({})
        self._waiting: dict[str, _Sent] = {}
        self._told: set[str] = set()

    # -- what a strategy calls ----------------------------------------------------------------

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Encode and push."""
        sent = self._encoded(messages)
        ids = list(self._grid.push_messages([message for message, _ in sent]))
        self._wait(ids, sent)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull and decode."""
        return [self._decoded(reply) for reply in self._grid.pull_messages(message_ids)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Encode, push, pull and decode."""
        sent = self._encoded(messages)
        pushed = [message for message, _ in sent]
        replies = list(self._grid.send_and_receive(pushed, timeout=timeout))
        # Flower gives a message its id when it is pushed.
        ids = [message.metadata.message_id for message in pushed]
        self._wait(ids, sent)
        decoded = [self._decoded(reply) for reply in replies]
        for message_id in ids:
            self._waiting.pop(message_id, None)  # nobody will ask for these again
        return decoded

    def set_run(self, run: Any) -> None:
        """As the wrapped grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """As the wrapped grid."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """As the wrapped grid."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """As the wrapped grid."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        """As the wrapped grid."""
        return self._grid.get_nodes()

    def _agree(self, model: Update) -> None:
        """Settle what both ends need: the codecs, and names of what travels bit for bit.

        Those are the integers of the first model. Strategies average them too, and then they are
        float64; a counter in a block of weights would set the block's scale.

        Raises:
            ConfigError, UpdateError: a codec or a rule does not fit the model.
        """
        spec = UpdateSpec.of(model)
        kept = [t.name for t in spec if not t.dtype.is_floating_point]
        choice = {**self._choice, "kept": kept}
        self._settings = json.dumps(choice, sort_keys=True, separators=(",", ":"))
        up, down = (Coding(codec, self._rules, kept) for codec in self._codecs)
        self._uplink, self._downlink, self._senders = up, down, {}
        Sender(down)  # refuses codings that do not contract
        for coding in (up, down) if model else ():
            coding.plan(spec)  # or every node would refuse it in every round

    def _sender(self, node: int, model: Update) -> Sender:
        """What codes for a node, moved to the model: a sender of its own, or one for all."""
        key = node if self._per_node else None
        if self._per_node and node not in self._held:
            self._senders.pop(key, None)  # it is sent the whole model, as it is
        sender = self._senders.setdefault(key, Sender(self._downlink))
        if self._per_node and node in self._held:
            sender.forget_before(self._held[node])
        sender.move(model)
        return sender

    # -- outgoing -----------------------------------------------------------------------------

    def _encoded(self, messages: Iterable[Message]) -> list[tuple[Message, _Sent | None]]:
        read: int | None = None
        model: dict[str, Tensor] = {}
        out: list[tuple[Message, _Sent | None]] = []
        for message in messages:
            found = list(message.content.array_records.items())
            if len(found) > 1:
                self._tell_once("messages with more than one ArrayRecord are sent uncompressed")
            if len(found) != 1 or not container.has_floats(found[0][1]):
                out.append((message, None))
                continue
            name, record = found[0]
            if read != id(record):  # strategies put one record into all messages
                model = container.tensors_of(record)
                if not self._senders:
                    self._agree(model)
                read = id(record)
            out.append((message, self._encode(message, name, model)))
        return out

    def _encode(self, message: Message, name: str, model: dict[str, Tensor]) -> _Sent:
        node = message.metadata.dst_node_id
        held, sender = self._held.get(node), self._sender(node, model)
        copy = sender.copy
        if held is None:
            record = container.record_of(copy.tensors)
        else:
            increments = replace(sender.message(held), start=held)
            record = container.packed(increments.to_parts())
        content = RecordDict({**message.content, name: record})
        # A new content: strategies put one content into all messages.
        entries = {SETTINGS: self._settings, VERSION: copy.version.hex()}
        message.content = offered(content, entries)
        return _Sent(message, model, copy.version, held is not None)

    def _wait(self, ids: Iterable[str], sent: Iterable[tuple[Message, _Sent | None]]) -> None:
        for message_id, (_, one) in zip(ids, sent, strict=True):
            if one is not None and message_id:
                self._waiting[message_id] = one

    def _tell_once(self, text: str, *values: object) -> None:
        if text not in self._told:
            self._told.add(text)
            logger.warning(f"gradcodec: {text}", *values)

    # -- incoming -----------------------------------------------------------------------------

    def _decoded(self, reply: Message) -> Message:
        sent = self._waiting.pop(reply.metadata.reply_to_message_id, None)
        if sent is None:
            return reply
        node = sent.message.metadata.dst_node_id
        if reply.has_error():
            self._held.pop(node, None)
            return reply
        packed = [n for n, r in reply.content.array_records.items() if container.is_packed(r)]
        if packed or sent.coded:  # the node has the mod, and what it was sent
            self._held[node] = sent.version
        elif reply.content.array_records:
            self._tell_once(
                "node %d (others are not named) replied in plain arrays, uncompressed: its "
                "ClientApp has no CompressMod, or returns other arrays than came",
                node,
            )
        try:
            for name in packed:
                record = reply.content.array_records[name]
                reply.content[name] = self._record(record, sent)
        except GradcodecError as err:
            reason = f"{type(err).__name__}: {err}"
            logger.warning("gradcodec: dropped the reply of node %d: %s", node, reason)
            self._held.pop(node, None)
            return Message(Error(BAD_REPLY, reason), reply_to=sent.message)
        return reply

    def _record(self, record: ArrayRecord, sent: _Sent) -> ArrayRecord:
        """The model that a node has trained, in the order of what it was sent.

        Raises:
            WireError: the bytes are damaged, or an update of another model.
            NonFiniteError: the model would hold NaN or Inf.
        """
        parts = container.unpacked(record)
        base = parts.pop(BASE, b"")
        if base != sent.version:
            raise CodecMismatchError(
                f"expected an update of version {sent.version.hex()}, got one of {base.hex()}"
            )
        trained = Copy(dict(sent.model), sent.version)
        if parts:
            trained.advance(parts, self._uplink)
        for name, tensor in trained.tensors.items():
            if tensor.dtype.is_floating_point:
                layout.check_finite(tensor, name)
        return container.record_of(trained.tensors)
