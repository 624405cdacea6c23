"""What a node knows of one run: it decodes models, encodes what was trained, and keeps the rest."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import Context, RecordDict
from torch import Tensor

from gradcodec import wire
from gradcodec.errors import ConfigError, UpdateError, WireError
from gradcodec.integrations.flower import container
from gradcodec.integrations.messages.choice import codec_of
from gradcodec.integrations.messages.coding import Coding
from gradcodec.integrations.messages.copies import EXACT, Copy, Message, changes
from gradcodec.integrations.messages.feedback import Feedback

STATE = "gradcodec"
"""The record in ``context.state`` that holds what this node knows, from round to round."""

BASE = "base"
"""The part of a reply that names the version it was trained on."""

_COPY = "copy/"

_CHOICE = {"uplink", "downlink", "rules", "feedback", "kept"}


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
    def of(cls, ctx: Context, settings: str) -> Node:
        """What was kept of this run and choice of codecs, or a new start."""
        run = str(ctx.run_id)
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

    def decode(self, content: RecordDict, name: str, version: str) -> RecordDict:
        """Move to the model in this record of a message; returns the message with plain arrays.

        Raises:
            WireError: it is damaged, or applies to another version.
        """
        record = content.array_records[name]
        if container.is_packed(record):
            message = Message.from_parts(container.unpacked(record))
            self.copy.receive(message, self._coding("downlink"))
        else:
            self.copy = Copy(container.tensors_of(record), bytes.fromhex(version))
            if self.feedback is not None:  # of an earlier training, or of a reply that was dropped
                self.feedback.kept, self.moved = (None, b""), frozenset()
        return RecordDict({**content, name: container.record_of(self.copy.tensors)})

    def encode(self, content: RecordDict, name: str, node: int) -> bool:
        """Put into the record of the trained model what training has changed.

        Args:
            content: a reply.
            name: of the record in which the model came.
            node: the node's id, for the seed.

        Returns:
            Whether there is such a record.

        Raises:
            UpdateError: a tensor has another shape than the model's.
        """
        held = self.copy.tensors
        at = _trained(content, name, held)
        if at is None:
            return False
        coding, tensors = self._coding("uplink"), container.tensors_of(content.array_records[at])
        for key, before in held.items():
            if tensors[key].shape != before.shape:  # torch would repeat it to fit
                raise UpdateError(
                    f"{key!r}: expected the shape {tuple(before.shape)} of the model that came, "
                    f"got {tuple(tensors[key].shape)}"
                )
        update = changes({key: tensors[key] for key in held}, held, coding, self.moved)
        seed = zlib.crc32(f"{node}/{self.copy.version.hex()}".encode())
        parts = coding.encode(update, seed=seed, feedback=self.feedback) if update else {}
        if self.feedback is not None and self.feedback.kept[0] is not None:
            self.moved = frozenset(n for n, t in update.items() if t.dtype.is_floating_point)
        content[at] = container.packed({**parts, BASE: self.copy.version})
        return True

    def _coding(self, way: str) -> Coding:
        chosen = _settings(self.settings)
        rules = tuple((pattern, name) for pattern, name in chosen["rules"])
        return Coding(codec_of(chosen[way]), rules, chosen["kept"])


def _trained(content: RecordDict, name: str, model: Mapping[str, Tensor]) -> str | None:
    """The name of the record that holds the trained model, if there is one.

    Another record of the same tensors (control variates, momenta) is not relative to the model.
    """
    found = [at for at, record in content.array_records.items() if set(record) == set(model)]
    return name if name in found else found[0] if len(found) == 1 else None


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
