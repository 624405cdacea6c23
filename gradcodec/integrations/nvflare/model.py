"""Filters of task data: the server sends how the model changed, a client restores the model."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from gradcodec.encodable import shown
from gradcodec.errors import MalformedBodyError, WireError
from gradcodec.integrations.messages.copies import Copy, Message, Sender
from gradcodec.integrations.nvflare import carrier
from gradcodec.integrations.nvflare.filters import CodecFilter
from gradcodec.settings import CodecConfig

HELD = "gradcodec_version"
"""The public property by which a client tells the server, in each request, what it holds."""

_NOTE = ("tensors", "kept")


class EncodeModel(CodecFilter):
    """Encodes the global model, ``WEIGHTS``, for the client that asked for a task.

        recipe.add_server_output_filter(EncodeModel("int4"), tasks=["train"])

    A client gets the whole model once, bit for bit. Then it gets the difference to what it holds,
    or the last few of them if it missed rounds. The difference includes what coding the earlier
    ones lost, so clients stay as near to the server's model as one coded difference is exact.
    Unchanged tensors are not sent, unless the codec is bound to its tensors. Integers of the first
    model travel bit for bit also after aggregation has made floats of them.

    Args:
        codec: as that of ``EncodeUpdate``; its error must be smaller than its input.
        rules: as those of ``EncodeUpdate``.

    Raises:
        ConfigError: an argument is of another kind. When a task is sent: the codec's error is not
            smaller than its input, or the model is encrypted or quantised.
        NonFiniteError, UpdateError: when a task is sent: the model does not fit the codec.
    """

    def __init__(
        self,
        codec: str | CodecConfig | Mapping[str, Any],
        rules: Sequence[Sequence[str]] = (),
    ) -> None:
        super().__init__([DataKind.WEIGHTS], codec, rules)
        self._lock = threading.Lock()  # clients are served by threads
        self._sender: Sender | None = None
        self._kept: list[str] = []

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """The message for the client that asked, as a new DXO."""
        carrier.check_plain(dxo, type(self).__name__)
        tensors, kind = carrier.tensors_of(dxo)
        peer = fl_ctx.get_peer_context()
        held = None if peer is None else peer.get_prop(HELD)
        with self._lock:
            if self._sender is None:
                self._kept = [n for n, t in tensors.items() if not t.dtype.is_floating_point]
                self._sender = Sender(self.coding_that_keeps(self._kept))
            self._sender.move(tensors)
            message = self._sender.message(_version(held))
        parts = message.to_parts()
        what = "whole model" if message.whole else f"{len(message.steps)} increments of the model"
        self.log_sizes(fl_ctx, what, tensors, parts)
        return carrier.encoded(dxo, parts, {"tensors": kind, "kept": json.dumps(self._kept)})


class DecodeModel(CodecFilter):
    """Restores the global model at a client, before the task is executed.

        recipe.add_client_input_filter(DecodeModel("int4"), tasks=["train"])

    If a message cannot be applied, the error fails this task, and the next one brings the whole
    model. A task that is not encoded passes unchanged.

    Args:
        codec, rules: as those of the server's ``EncodeModel``.

    Raises:
        ConfigError: an argument is of another kind.
        WireError: when a task comes: it is damaged, or of another codec.
    """

    def __init__(
        self,
        codec: str | CodecConfig | Mapping[str, Any],
        rules: Sequence[Sequence[str]] = (),
    ) -> None:
        super().__init__([DataKind.WEIGHTS], codec, rules)
        self._copy = Copy()

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """The model; ``None`` if the task is plain."""
        if not carrier.is_encoded(dxo):
            return None
        try:
            parts, note = carrier.parts_of(dxo, _NOTE)
            coding = self.coding_that_keeps(_names(note["kept"]))
            self._copy.receive(Message.from_parts(parts), coding)
            # Clones, because training may write into what it is given.
            tensors = {name: t.clone() for name, t in self._copy.tensors.items()}
            made = carrier.plain(dxo, tensors, note["tensors"])
        except WireError:
            self._copy = Copy()
            raise
        finally:
            held = self._copy.version.hex()
            fl_ctx.set_prop(HELD, held, private=False, sticky=True)
        self.log_sizes(fl_ctx, "decoded model", tensors, parts)
        return made


def _names(text: object) -> list[str]:
    """What the server's note says of names.

    Raises:
        MalformedBodyError: it is no list of them.
    """
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise MalformedBodyError(f"expected names in JSON, got {shown(text)}")
    return found


def _version(held: object) -> bytes:
    """What a client says it holds; anything odd means that it holds nothing."""
    try:
        return bytes.fromhex(held) if isinstance(held, str) else b""
    except ValueError:
        return b""
