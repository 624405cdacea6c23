"""The packer that loses nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcodec.packers.packer import Packer
from gradcodec.settings import CodecConfig


@dataclass(frozen=True)
class IdentityConfig(CodecConfig):
    """The lossless codec has no settings."""

    kind: ClassVar[str] = "identity"


class RawPacker(Packer):
    """The values' own bytes, little-endian fp32; NaN and Inf included.

    x --fp32--> body
    """

    kind = "identity"

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which values of ``dtype`` are sent."""
        return dtype

    @property
    def grain(self) -> int:
        """1, because every value is packed separately."""
        return 1

    def nbytes(self, numel: int) -> int:
        """The size of ``numel`` fp32 values in their wire dtype."""
        return numel * self.wire_dtype(torch.float32).itemsize

    def _packed(self, x: Tensor, seed: int) -> Tensor:
        sent = x.to(self.wire_dtype(torch.float32)).contiguous().reshape(-1)
        # A body never shares memory with the vector.
        return (sent.clone() if sent.data_ptr() == x.data_ptr() else sent).view(torch.uint8)

    def _unpacked(self, body: Tensor, numel: int) -> Tensor:
        sent = self.wire_dtype(torch.float32)
        # A slice of a larger body may not begin at a multiple of the item size.
        return body.clone().view(sent).float()
