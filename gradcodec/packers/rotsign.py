"""Signs of a randomly rotated vector: one bit a value or less, without bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradcodec import layout, ops
from gradcodec.errors import ConfigError, MalformedBodyError
from gradcodec.packers.packer import Packer
from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.settings import CodecConfig, check_one_of, check_whole

SEED_BYTES = 4


@dataclass(frozen=True)
class RotatedSignConfig(CodecConfig):
    """``kept`` of every ``block`` rotated values are sent, by their signs.

    Attributes:
        block: a power of two, 8 to 4,096.
        kept: 1 to ``block``.
        which: the ``"first"`` of a block, which takes one bit for each, or the ``"largest"``, whose
            positions are sent too. For equal bytes below one bit a value, few of the largest have
            a smaller error than many of the first (see ``RotatedPeaksPacker``).
    """

    kind: ClassVar[str] = "rotsign"
    LATER: ClassVar[tuple[str, ...]] = ("which",)
    block: int = 256
    kept: int = 256
    which: str = "first"

    def __post_init__(self) -> None:
        block, kept = self.block, self.kept
        check_whole(self.kind, "block", block, 8, 4096)
        if block & (block - 1):
            raise ConfigError(f"rotsign: expected a power of two as block, got {block}")
        check_whole(self.kind, "kept", kept, 1, block)
        check_one_of(self.kind, "which", self.which, ("first", "largest"))


class RotatedPacker(Packer):
    """What packers of rotated signs have in common: ``body = seed | scales (bf16) | ...``."""

    kind = "rotsign"
    finite: ClassVar[bool] = True

    def __init__(self, config: RotatedSignConfig) -> None:
        self.config = config

    def _blocks(self, numel: int) -> int:
        return -(-numel // self.config.block)

    def surely_finite(self, body: Tensor, numel: int) -> bool:
        """By the largest scale: no sum of a rotation exceeds ``block`` scales."""
        cut = SEED_BYTES + 2 * self._blocks(numel)
        scales = body[SEED_BYTES:cut].clone().view(torch.bfloat16)
        return layout.within_fp32(scales, self.config.block)

    @staticmethod
    def _checked(scales: Tensor) -> Tensor:
        if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
            raise MalformedBodyError("rotsign: expected finite, non-negative scales")
        return scales


class RotatedSignPacker(RotatedPacker):
    """One-bit mean estimation: DRIVE (arXiv 2105.08339); below one bit EDEN (arXiv 2108.08842).

        x [block] --H D--> y --first `kept`, signs--> body = seed | scales (bf16) | bits

    with ``H`` the Walsh-Hadamard matrix and ``D`` random signs drawn from the seed. After the
    rotation every value looks Gaussian, whatever ``x`` was, so every sign is equally informative.
    The scale ``|x|^2 / sum |y_kept|`` makes the estimate unbiased over the rotation (up to the
    rounding of scales to bf16), at a relative squared error of about ``pi/2 * block/kept - 1``. The
    errors of many clients with different seeds average out; those of plain signs do not.

    Deviations from the papers: rotation in blocks instead of over the whole vector, and below one
    bit the first rows of the rotation instead of random ones, which the random signs make
    equivalent. The last block is padded with zeros and sent whole. NaN and Inf raise
    ``NonFiniteError``. The rotation is floating-point arithmetic: decoded values may differ in
    their last bits between devices.
    """

    def nbytes(self, numel: int) -> int:
        """The seed, two bytes per scale, and ``kept`` bits per block, rounded up to a byte."""
        blocks = self._blocks(numel)
        return SEED_BYTES + 2 * blocks + packed_nbytes(blocks * self.config.kept, 1)

    @torch.no_grad()
    def pack(self, x: Tensor, *, seed: int = 0, residual: Tensor | None = None) -> Tensor:
        """As ``Packer.pack``, in one pass over the values, in their own dtype."""
        return self._coded(x.detach(), seed, residual)

    def _packed(self, x: Tensor, seed: int) -> Tensor:
        return self._coded(x, seed, None)

    def _coded(self, x: Tensor, seed: int, residual: Tensor | None) -> Tensor:
        values = x if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else x.float()
        layout.check_finite(values, "rotsign")
        seed &= 0xFFFFFFFF
        block, kept = self.config.block, self.config.kept
        signs = ops.random_sign_words(self._blocks(values.numel()) * block, seed, values.device)
        packed, scales = ops.rotsign_encode(
            values, signs, block=block, kept=kept, residual=residual
        )
        # The scale of a block with values near fp32's maximum may overflow.
        layout.check_finite(scales, "rotsign scales")
        drawn = torch.tensor(list(seed.to_bytes(SEED_BYTES, "little")), dtype=torch.uint8)
        return torch.cat([drawn.to(values.device), scales.view(torch.uint8), packed])

    def _unpacked(self, body: Tensor, numel: int) -> Tensor:
        return self.mean(body[None], numel)

    @torch.no_grad()
    def mean(self, bodies: Tensor, numel: int, weights: Sequence[float] | None = None) -> Tensor:
        """As ``Packer.mean``, without a dense vector for each body."""
        self._check_length(bodies.shape[1], numel)
        block, kept, blocks = self.config.block, self.config.kept, self._blocks(numel)
        cut = SEED_BYTES + 2 * blocks
        # Copied flat first, because the scales of a row may begin at an odd byte.
        scales = bodies[:, SEED_BYTES:cut].reshape(-1).clone().view(torch.bfloat16)
        self._checked(scales)
        seeds = [int.from_bytes(bytes(row), "little") for row in bodies[:, :SEED_BYTES].tolist()]
        words = [ops.random_sign_words(blocks * block, seed, bodies.device) for seed in seeds]
        return ops.rotsign_mean(
            bodies[:, cut:],
            scales.view(len(bodies), -1),
            torch.stack(words) if len(words) > 1 else words[0][None],
            numel,
            block=block,
            kept=kept,
            weights=None if weights is None else torch.tensor(weights, device=bodies.device),
        )
