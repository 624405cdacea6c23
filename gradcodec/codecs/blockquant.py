"""Block quantisation as a codec: the default where nothing can be trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcodec import layout, wire
from gradcodec.codecs.base import Codec, CodecConfig, register
from gradcodec.errors import ConfigError, MalformedBodyError
from gradcodec.reference.bitpack import pack_bits, packed_nbytes, unpack_bits
from gradcodec.reference.block_quantize import block_dequantize, block_quantize, scales_per_block

_BITS = (1, 2, 4, 8)

SEGMENT = 1 << 18
"""About this many values are worked on at a time: no copies of the whole, and it fits a cache."""


@dataclass(frozen=True)
class BlockQuantConfig(CodecConfig):
    """``bits`` per value (1, 2, 4 or 8); ``block`` values share their bf16 scales."""

    kind: ClassVar[str] = "blockquant"
    bits: int = 4
    block: int = 256

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in _BITS:
            raise ConfigError(f"blockquant: expected bits of {_BITS}, got {self.bits!r}")
        if not isinstance(self.block, int) or not 8 <= self.block <= 1 << 20:
            raise ConfigError(f"blockquant: expected a block of 8..{1 << 20}, got {self.block!r}")


@register
class BlockQuant(Codec):
    """Nearest rounding to ``2**bits`` levels with bf16 scales for every block.

        values --blocks--> scales (bf16), codes --pack--> body = scales | packed codes

    The levels of each bit width are those of ``gradcodec.reference.block_quantize``. Blocks run
    over the concatenation of all tensors. NaN and Inf raise ``NonFiniteError``.
    """

    Config = BlockQuantConfig
    config: BlockQuantConfig

    def __init__(self, config: CodecConfig | None = None, **parts: Any) -> None:
        super().__init__(config or BlockQuantConfig(), **parts)

    def packed_nbytes(self, numel: int) -> int:
        """Two bytes per scale and ``bits`` bits per value, rounded up to a byte."""
        return self._scale_nbytes(numel) + packed_nbytes(numel, self.config.bits)

    def _scale_nbytes(self, numel: int) -> int:
        return -(-numel // self.config.block) * 2 * scales_per_block(self.config.bits)

    @property
    def _segment(self) -> int:
        # Whole blocks and whole bytes: eight blocks are both, whatever their size.
        return 8 * self.config.block * max(1, SEGMENT // (8 * self.config.block))

    def _pack(self, z: Tensor, seed: int) -> bytes:
        layout.check_finite(z, "blockquant")
        scales, packed = [], []
        for part in torch.split(z, self._segment):
            codes, its_scales = block_quantize(part.float(), self.config.bits, self.config.block)
            # The mean of values near the end of the fp32 range may be beyond it.
            layout.check_finite(its_scales, "blockquant scales")
            scales.append(wire.raw_bytes(its_scales))
            packed.append(wire.raw_bytes(pack_bits(codes, self.config.bits)))
        return b"".join(scales + packed)

    def _unpack(self, body: bytes, numel: int) -> Tensor:
        cut = self._scale_nbytes(numel)
        view = memoryview(body)
        scales = wire.raw_tensor(view[:cut], torch.bfloat16)
        if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
            raise MalformedBodyError("blockquant: expected finite, non-negative scales")
        bits, block = self.config.bits, self.config.block
        packed = torch.split(wire.raw_tensor(view[cut:], torch.uint8), self._segment * bits // 8)
        scales = scales.view(-1, scales_per_block(bits))
        out = torch.empty(numel)
        for part, its, bytes_of in zip(
            torch.split(out, self._segment),
            torch.split(scales, self._segment // block),
            packed,
            strict=True,
        ):
            codes = unpack_bits(bytes_of, bits, len(part))
            part.copy_(block_dequantize(codes, its, bits, block))
        return out
