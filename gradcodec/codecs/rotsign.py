"""Signs of a randomly rotated vector: one bit a value or less, without bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradcodec import layout, wire
from gradcodec.codecs.base import Codec, register
from gradcodec.codecs.settings import CodecConfig, check_whole
from gradcodec.errors import ConfigError, MalformedBodyError
from gradcodec.reference.bitpack import pack_bits, packed_nbytes, unpack_bits
from gradcodec.reference.hadamard import random_signs, rotate, rotate_back

_SEED_BYTES = 4


@dataclass(frozen=True)
class RotatedSignConfig(CodecConfig):
    """``kept`` of every ``block`` rotated values are sent, with one bit each."""

    kind: ClassVar[str] = "rotsign"
    block: int = 256
    kept: int = 256

    def __post_init__(self) -> None:
        block, kept = self.block, self.kept
        check_whole(self.kind, "block", block, 8, 4096)
        if block & (block - 1):
            raise ConfigError(f"rotsign: expected a power of two as block, got {block}")
        check_whole(self.kind, "kept", kept, 1, block)


@register
class RotatedSign(Codec):
    """One-bit mean estimation: DRIVE (arXiv 2105.08339); below one bit EDEN (arXiv 2108.08842).

        x [block] --H D--> y --first `kept`, signs--> body = seed | scales (bf16) | bits

    with ``H`` the Walsh-Hadamard matrix and ``D`` random signs drawn from the seed. After the
    rotation every value looks Gaussian, whatever ``x`` was, so that its sign says equally much. The
    scale ``|x|^2 / sum |y_kept|`` makes the estimate unbiased over the rotation (up to the rounding
    of scales to bf16), at a relative squared error of about ``pi/2 * block/kept - 1``: errors of
    many clients with seeds of their own average out, which a mean of plain signs does not.

    Deviations from the papers: rotation in blocks instead of over the whole vector, and below one
    bit the first rows of the rotation instead of random ones, which the random signs make
    equivalent. The last block is padded with zeros and sent whole. NaN and Inf raise
    ``NonFiniteError``. The rotation is a product of floats: decoded values are not promised to be
    equal to the bit on different devices.
    """

    Config = RotatedSignConfig
    config: RotatedSignConfig
    finite: ClassVar[bool] = True

    def __init__(self, config: CodecConfig | None = None, **parts: Any) -> None:
        super().__init__(config or RotatedSignConfig(), **parts)

    def _blocks(self, numel: int) -> int:
        return -(-numel // self.config.block)

    def packed_nbytes(self, numel: int) -> int:
        """The seed, two bytes per scale, and ``kept`` bits per block, rounded up to a byte."""
        blocks = self._blocks(numel)
        return _SEED_BYTES + 2 * blocks + packed_nbytes(blocks * self.config.kept, 1)

    def _pack(self, z: Tensor, seed: int) -> bytes:
        layout.check_finite(z, "rotsign")
        seed &= 0xFFFFFFFF
        block, blocks = self.config.block, self._blocks(z.numel())
        rows = torch.zeros(blocks * block)
        rows[: z.numel()] = z.detach().float().cpu()
        rows = rows.view(blocks, block)
        # Squares of values near the ends of the fp32 range would leave it.
        peak = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        y = rotate(rows / peak, random_signs(rows.numel(), seed).view(blocks, block))
        sent = y[:, : self.config.kept]
        total = sent.abs().sum(1, keepdim=True)
        energy = y.square().sum(1, keepdim=True)
        some = total.clamp_min(1e-30)
        scales = peak * energy / some
        # The product of large values may leave fp32 where the scale does not.
        scales = torch.where(torch.isfinite(scales), scales, peak * (energy / some))
        scales = torch.where(total > 0, scales, 0.0)
        layout.check_finite(scales.to(torch.bfloat16), "rotsign scales")
        body = seed.to_bytes(_SEED_BYTES, "little") + wire.raw_bytes(scales.to(torch.bfloat16))
        return body + wire.raw_bytes(pack_bits((sent < 0).reshape(-1), 1))

    def _unpack(self, body: bytes, numel: int) -> Tensor:
        block, kept, blocks = self.config.block, self.config.kept, self._blocks(numel)
        view = memoryview(body)
        seed, cut = int.from_bytes(view[:_SEED_BYTES], "little"), _SEED_BYTES + 2 * blocks
        scales = wire.raw_tensor(view[_SEED_BYTES:cut], torch.bfloat16)
        if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
            raise MalformedBodyError("rotsign: expected finite, non-negative scales")
        bits = unpack_bits(wire.raw_tensor(view[cut:], torch.uint8), 1, blocks * kept)
        y = (1.0 - 2.0 * bits.float()).view(blocks, kept) * scales.float()[:, None]
        signs = random_signs(blocks * block, seed).view(blocks, block)
        return rotate_back(y, signs).reshape(-1)[:numel]
