"""The client's side: a mod that decodes the model and encodes what was trained."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from gradcodec import wire
from gradcodec.errors import ConfigError, UpdateError, WireError
from gradcodec.integrations.flower import container
from gradcodec.integrations.messages.choice import codec_of
from gradcodec.integrations.messages.coding import Coding
from gradcodec.integrations.messages.copies import EXACT, Copy, changes
from gradcodec.integrations.messages.copies import Message as Increments
from gradcodec.integrations.messages.feedback import Feedback

SETTINGS, VERSION = "gradcodec.settings", "gradcodec.version"
"""Entries of a message's ``ConfigRecord``: the server's choice of codecs, in JSON, and the version
of the model in the message."""

STATE = "gradcodec"
"""The record in ``context.state`` that holds what this node knows, from round to round."""

BASE = "base"
"""The part of a reply that names the version it was trained on."""

_COPY = "copy/"

_CHOICE = {"uplink", "downlink", "rules", "feedback", "kept"}

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
        found = list(msg.content.array_records.items())
        if offer is None or len(found) != 1:
            return call_next(msg, ctx)
        name, record = found[0]
        node = Node.of(ctx, offer)
        node.receive(record, offer)
        msg.content = _plain(msg.content, name, node.copy.tensors)
        node.keep(ctx)
        reply = call_next(msg, ctx)
        at = None if reply.has_error() else _trained(reply.content, name, node.copy.tensors)
        if at is not None:
            reply.content[at] = node.encoded(reply.content.array_records[at], ctx)
            node.keep(ctx)
        return reply


@dataclass
class Node:
    """What a node knows of one run.

    Attributes:
        run: the run's id.
        settings: the server's choice of codecs, in JSON.
        copy: the model as this node has it.
        feedback: what coding has lost, or ``None``.
        moved: tensors that ``feedback`` is of; they travel also when they rest.
    """

    run: str
    settings: str
    copy: Copy
    feedback: Feedback | None
    moved: frozenset[str] = frozenset()

    @classmethod
    def of(cls, ctx: Context, offer: Mapping[str, str]) -> Node:
        """What was kept of this run and choice of codecs, or a new start."""
        run, settings = str(ctx.run_id), offer[SETTINGS]
        always = _settings(settings)["feedback"]
        node = cls(run, settings, Copy(), None if always is False else Feedback(bool(always)))
        if STATE not in ctx.state:
            return node
        parts = container.unpacked(ctx.state.array_records[STATE])
        if parts.pop("run") != run.encode() or parts.pop("settings") != settings.encode():
            return node
        version, digest, lost, moved = (
            parts.pop(k) for k in ("version", "digest", "lost", "moved")
        )
        if node.feedback is not None and lost:
            node.feedback.kept = wire.raw_tensor(lost, torch.float32), digest
            node.moved = frozenset(json.loads(moved))
        tensors = EXACT.decode({name.removeprefix(_COPY): part for name, part in parts.items()})
        node.copy = Copy(tensors, version)
        return node

    def keep(self, ctx: Context) -> None:
        """Put everything into the node's state."""
        lost, digest = (None, b"") if self.feedback is None else self.feedback.kept
        parts = {
            "run": self.run.encode(),
            "settings": self.settings.encode(),
            "version": self.copy.version,
            "digest": digest,
            "lost": b"" if lost is None else wire.raw_bytes(lost),
            "moved": json.dumps(sorted(self.moved)).encode(),
        }
        copy = {_COPY + name: part for name, part in EXACT.encode(self.copy.tensors).items()}
        ctx.state[STATE] = container.packed({**parts, **copy})

    def receive(self, record: ArrayRecord, offer: Mapping[str, str]) -> None:
        """Move to the model of a message.

        Raises:
            WireError: it is damaged, or applies to another version.
        """
        if container.is_packed(record):
            message = Increments.from_parts(container.unpacked(record))
            self.copy.receive(message, self._coding("downlink"))
        else:
            self.copy = Copy(container.tensors_of(record), bytes.fromhex(offer[VERSION]))
            if self.feedback is not None:  # of an earlier training, or of a reply that was dropped
                self.feedback.kept, self.moved = (None, b""), frozenset()

    def encoded(self, trained: ArrayRecord, ctx: Context) -> ArrayRecord:
        """The record of what training has changed.

        Raises:
            UpdateError: a tensor has another shape than the model's.
        """
        coding, tensors = self._coding("uplink"), container.tensors_of(trained)
        held = self.copy.tensors
        for name, before in held.items():
            if tensors[name].shape != before.shape:  # torch would repeat it to fit
                raise UpdateError(
                    f"{name!r}: expected the shape {tuple(before.shape)} of the model that came, "
                    f"got {tuple(tensors[name].shape)}"
                )
        update = changes({name: tensors[name] for name in held}, held, coding, self.moved)
        seed = zlib.crc32(f"{ctx.node_id}/{self.copy.version.hex()}".encode())
        parts = coding.encode(update, seed=seed, feedback=self.feedback) if update else {}
        if self.feedback is not None and self.feedback.kept[0] is not None:
            self.moved = frozenset(n for n, t in update.items() if t.dtype.is_floating_point)
        return container.packed({**parts, BASE: self.copy.version})

    def _coding(self, way: str) -> Coding:
        chosen = _settings(self.settings)
        rules = tuple((pattern, name) for pattern, name in chosen["rules"])
        return Coding(codec_of(chosen[way]), rules, chosen["kept"])


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


def _trained(content: RecordDict, name: str, model: Mapping[str, Tensor]) -> str | None:
    """The name of the record that holds the trained model, if there is one.

    Another record of the same tensors (control variates, momenta) is not relative to the model.
    """
    found = [at for at, record in content.array_records.items() if set(record) == set(model)]
    return name if name in found else found[0] if len(found) == 1 else None


def _plain(content: RecordDict, name: str, tensors: Mapping[str, Tensor]) -> RecordDict:
    """What the app is given: plain arrays, and a config without our entries."""
    configs = {
        key: ConfigRecord({k: v for k, v in record.items() if k not in (SETTINGS, VERSION)})
        for key, record in content.config_records.items()
    }
    return RecordDict({**content, **configs, name: container.record_of(tensors)})


def _settings(text: str) -> dict[str, Any]:
    """The server's choice.

    Raises:
        WireError, ConfigError: it is not one.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise WireError(f"expected codecs in JSON, got {text[:80]!r}") from err
    if not isinstance(found, dict) or set(found) != _CHOICE:
        raise ConfigError(
            f"expected a choice of codecs, got {text[:80]!r}: server and client have different "
            "versions of gradcodec"
        )
    return found
