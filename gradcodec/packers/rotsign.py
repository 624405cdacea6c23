"""Signs of a randomly rotated vector: one bit a value or less, without bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.errors import ConfigError, MalformedBodyError
from gradcodec.packers.packer import Packer
from gradcodec.reference.bitpack import pack_bits, packed_nbytes, unpack_bits
from gradcodec.reference.hadamard import random_signs, rotate, rotate_back
from gradcodec.settings import CodecConfig, check_whole

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


class RotatedSignPacker(Packer):
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

    kind = "rotsign"
    finite: ClassVar[bool] = True

    def __init__(self, config: RotatedSignConfig) -> None:
        self.config = config

    def _blocks(self, numel: int) -> int:
        return -(-numel // self.config.block)

    def nbytes(self, numel: int) -> int:
        """The seed, two bytes per scale, and ``kept`` bits per block, rounded up to a byte."""
        blocks = self._blocks(numel)
        return _SEED_BYTES + 2 * blocks + packed_nbytes(blocks * self.config.kept, 1)

    def _packed(self, x: Tensor, seed: int) -> Tensor:
        layout.check_finite(x, "rotsign")
        seed &= 0xFFFFFFFF
        block, blocks = self.config.block, self._blocks(x.numel())
        rows = torch.zeros(blocks * block)
        rows[: x.numel()] = x.cpu()
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
        drawn = torch.tensor(list(seed.to_bytes(_SEED_BYTES, "little")), dtype=torch.uint8)
        sizes = scales.to(torch.bfloat16).reshape(-1).view(torch.uint8)
        return torch.cat([drawn, sizes, pack_bits((sent < 0).reshape(-1), 1)]).to(x.device)

    def _unpacked(self, body: Tensor, numel: int) -> Tensor:
        block, kept, blocks = self.config.block, self.config.kept, self._blocks(numel)
        view, cut = body.cpu(), _SEED_BYTES + 2 * blocks
        seed = int.from_bytes(view[:_SEED_BYTES].tolist(), "little")
        scales = view[_SEED_BYTES:cut].clone().view(torch.bfloat16)
        if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
            raise MalformedBodyError("rotsign: expected finite, non-negative scales")
        bits = unpack_bits(view[cut:], 1, blocks * kept)
        y = (1.0 - 2.0 * bits.float()).view(blocks, kept) * scales.float()[:, None]
        signs = random_signs(blocks * block, seed).view(blocks, block)
        return rotate_back(y, signs).reshape(-1)[:numel].to(body.device)
