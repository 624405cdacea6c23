"""The client's side: a mod that has the model decoded and what was trained encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import ConfigRecord, Context, Message, RecordDict

SETTINGS, VERSION = "gradcodec.settings", "gradcodec.version"
"""Entries of a message's ``ConfigRecord``: the server's choice of codecs, in JSON, and the version
of the model in the message."""

App = Callable[[Message, Context], Message]


class CompressMod:
    """Compresses what a ``ClientApp`` receives and sends, if the server has a ``CodecGrid``.

        app = ClientApp(mods=[CompressMod()])

    Put it first in the list: then other mods (clipping, noise) see plain arrays. The app is given
    plain arrays and returns plain arrays, of its whole model; of several records in its reply the
    one that is named as the one that came is coded, the others travel as they are. The server
    chooses the codecs and says so in the train config. Of a server without ``CodecGrid`` nothing
    changes.

    What a node keeps between rounds is in ``context.state``, because Flower starts a process for
    each message: its copy of the model, to which the next increments apply, and what coding has
    lost (error feedback). It belongs to one run and one choice of codecs, and starts anew with
    another; error feedback also when the whole model comes again.

    Raises, as an error reply, of which the server makes another start with this node:
        WireError: a message is damaged, or applies to another version of the model.
        NonFiniteError: training has left NaN or Inf.
        UpdateError: a tensor came out of training with another shape.
    """

    def __call__(self, msg: Message, ctx: Context, call_next: App) -> Message:
        """Decode, train, encode."""
        offer = _offer(msg)
        found = list(msg.content.array_records)
        if offer is None or len(found) != 1:
            return call_next(msg, ctx)
        # Not above: it loads torch, which takes seconds, and Flower starts a process a message.
        from gradcodec.integrations.flower.node import Node

        node = Node.of(ctx, offer[SETTINGS])
        msg.content = node.decode(_bare(msg.content), found[0], offer[VERSION])
        node.keep(ctx)
        reply = call_next(msg, ctx)
        if not reply.has_error() and node.encode(reply.content, found[0], ctx.node_id):
            node.keep(ctx)
        return reply


def offered(content: RecordDict, entries: Mapping[str, str]) -> RecordDict:
    """The content with these entries in its first config record; the given one is unchanged."""
    name = next(iter(content.config_records), "config")
    before = content.config_records[name] if name in content else {}
    return RecordDict({**content, name: ConfigRecord({**before, **entries})})


def _offer(msg: Message) -> dict[str, str] | None:
    if msg.has_error():
        return None
    for record in msg.content.config_records.values():
        if SETTINGS in record and VERSION in record:
            return {key: str(record[key]) for key in (SETTINGS, VERSION)}
    return None


def _bare(content: RecordDict) -> RecordDict:
    """The content without our entries."""
    configs = {
        key: ConfigRecord({k: v for k, v in record.items() if k not in (SETTINGS, VERSION)})
        for key, record in content.config_records.items()
    }
    return RecordDict({**content, **configs})
