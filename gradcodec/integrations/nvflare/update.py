"""Filters of task results: a client's update is encoded, the server decodes it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from gradcodec.errors import ConfigError, GradcodecError, NonFiniteError
from gradcodec.integrations.messages.feedback import Feedback
from gradcodec.integrations.nvflare import carrier
from gradcodec.integrations.nvflare.filters import CodecFilter
from gradcodec.settings import CodecConfig

_NOTE = ("tensors",)


class EncodeUpdate(CodecFilter):
    """Encodes a client's ``WEIGHT_DIFF``: a task result, before it leaves the site.

        recipe.add_client_output_filter(EncodeUpdate("int4"), tasks=["train"])

    The filter of a site lives as long as its job. So error feedback is kept here, from round to
    round. Tensors that have not changed in any round yet, such as frozen ones, take a bit each.
    An update with NaN or Inf costs its site this round: it is replaced by an empty one,
    which NVFLARE's aggregators skip, and a log line names the tensor.

    Args:
        codec: a codec's name, the config of one without weights (or its ``to_dict()``), a folder,
            or a Hub id. It is loaded when the first update comes.
        error_feedback: whether what coding lost is added to the next update; ``None`` decides by
            codec: on if its error is smaller than its input and not 0 on average.
        rules: ``(pattern, codec name)`` by tensor name, the first match wins. Integers and
            BatchNorm's statistics need no rule: they travel bit for bit.

    Raises:
        ConfigError: an argument is not of these kinds. When an update comes: it is encrypted,
            quantised, or whole weights instead of a difference; or error feedback would diverge.
        UpdateError: when an update comes: its tensors do not fit the codec.
    """

    def __init__(
        self,
        codec: str | CodecConfig | Mapping[str, Any],
        error_feedback: bool | None = None,
        rules: Sequence[Sequence[str]] = (),
    ) -> None:
        super().__init__([DataKind.WEIGHT_DIFF, DataKind.WEIGHTS], codec, rules)
        self.error_feedback = error_feedback
        self._feedback = None if error_feedback is False else Feedback(bool(error_feedback))
        self._count = 0
        self._moved: set[str] = set()

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """The encoded update, as a new DXO."""
        carrier.check_plain(dxo, type(self).__name__)
        if dxo.data_kind != DataKind.WEIGHT_DIFF:
            raise ConfigError(
                "EncodeUpdate: expected WEIGHT_DIFF, got WEIGHTS: send differences, for a recipe "
                "by params_transfer_type=TransferType.DIFF"
            )
        tensors, kind = carrier.tensors_of(dxo)
        self._count += 1
        # Not those that are zeros this time only: the residual is of the tensors that travel.
        self._moved |= {name for name, t in tensors.items() if bool(t.any())}
        still = set(tensors) - self._moved
        seed = zlib.crc32(f"{fl_ctx.get_identity_name()}/{self._count}".encode())
        try:
            parts = self.coding.encode(tensors, seed=seed, feedback=self._feedback, still=still)
        except NonFiniteError as err:
            self.log_error(fl_ctx, f"no update of this round is sent: {err}")
            return carrier.plain(dxo, {}, kind)
        self.log_sizes(fl_ctx, "encoded update", tensors, parts)
        return carrier.encoded(dxo, parts, {"tensors": kind})


class DecodeUpdate(CodecFilter):
    """Decodes a client's update on the server, before it is aggregated.

        recipe.add_server_input_filter(DecodeUpdate("int4"), tasks=["train"])

    A reply that cannot be decoded, or that another filter has processed, costs that reply, not the
    job: it is replaced by an empty update, which NVFLARE's aggregators skip, and a log line has the
    site, the error's name and its text. A plain reply passes unchanged.

    Args:
        codec, rules: as those of ``EncodeUpdate``.

    Raises:
        ConfigError: as ``EncodeUpdate``.
    """

    def __init__(
        self,
        codec: str | CodecConfig | Mapping[str, Any],
        rules: Sequence[Sequence[str]] = (),
    ) -> None:
        super().__init__([DataKind.WEIGHT_DIFF], codec, rules)

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """The decoded update; an empty one if it cannot be decoded; ``None`` if it is plain."""
        coding = self.coding  # outside: a codec that the server cannot load is no client's fault
        try:
            if not carrier.is_encoded(dxo):
                carrier.check_plain(dxo, type(self).__name__)
                return None
            parts, note = carrier.parts_of(dxo, _NOTE)
            tensors = coding.decode(parts)
            made = carrier.plain(dxo, tensors, note["tensors"])
        except GradcodecError as err:
            peer = fl_ctx.get_peer_context()
            site = "a site" if peer is None else peer.get_identity_name()
            self.log_error(fl_ctx, f"dropped the reply of {site}: {type(err).__name__}: {err}")
            return carrier.plain(dxo, {}, "torch")
        self.log_sizes(fl_ctx, "decoded update", tensors, parts)
        return made
