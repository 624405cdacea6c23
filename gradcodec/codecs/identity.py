"""The control codec: every bit of every tensor, whatever its dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcodec import layout, wire
from gradcodec.codecs.base import Codec, register
from gradcodec.codecs.settings import CodecConfig
from gradcodec.types import Update, UpdateSpec
from gradcodec.wire import Payload


@dataclass(frozen=True)
class IdentityConfig(CodecConfig):
    """No settings."""

    kind: ClassVar[str] = "identity"


@register
class Identity(Codec):
    """Raw little-endian values, tensor after tensor. Lossless and bitwise, NaN included.

    update --values--> body
    """

    Config = IdentityConfig
    any_dtype: ClassVar[bool] = True

    def __init__(self, config: CodecConfig | None = None, **parts: Any) -> None:
        super().__init__(config or self.Config(), **parts)

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which values of ``dtype`` are sent."""
        return dtype

    @property
    def grain(self) -> int:
        """Every value by itself."""
        return 1

    def packed_nbytes(self, numel: int) -> int:
        """Size of ``numel`` fp32 code values in their wire dtype."""
        return numel * self.wire_dtype(torch.float32).itemsize

    def nbytes(self, spec: UpdateSpec | None = None) -> int:
        """Sum of the tensors' sizes in their wire dtypes."""
        return sum(t.numel * self.wire_dtype(t.dtype).itemsize for t in self._known_spec(spec))

    def _pack(self, z: Tensor, seed: int) -> bytes:
        return wire.raw_bytes(z.to(self.wire_dtype(torch.float32)))

    def _unpack(self, body: bytes, numel: int) -> Tensor:
        return wire.raw_tensor(body, self.wire_dtype(torch.float32)).float()

    def _encode_body(self, update: Update, spec: UpdateSpec, seed: int) -> bytes:
        return b"".join(wire.raw_bytes(update[t.name].to(self.wire_dtype(t.dtype))) for t in spec)

    def _decode_body(self, body: bytes, spec: UpdateSpec) -> dict[str, Tensor]:
        self._check_length(body, spec)
        out, at = {}, 0
        for t in spec:
            sent = self.wire_dtype(t.dtype)
            raw = memoryview(body)[at : at + t.numel * sent.itemsize]
            # A bool byte other than 0 and 1 would be undefined in torch.
            read = torch.uint8 if sent is torch.bool else sent
            out[t.name] = wire.raw_tensor(raw, read).to(t.dtype).reshape(t.shape)
            at += len(raw)
        return out

    # Codes are the values themselves, so a code travels as the update that it is.

    def write_code(self, z: Tensor, *, seed: int = 0) -> Payload:
        """The payload of ``from_code(z)``."""
        return self.encoder.encode(self.from_code(z.detach()), seed=seed)

    def _checked_unpack(self, body: bytes, spec: UpdateSpec) -> Tensor:
        return layout.flatten(self._decode_body(body, spec), spec)
