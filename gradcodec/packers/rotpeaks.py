"""Signs of the largest values of a randomly rotated vector: below one bit a value, without bias."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec import layout, ops
from gradcodec.packers.positions import Positions
from gradcodec.packers.rotsign import SEED_BYTES, RotatedPacker
from gradcodec.reference import rotsign
from gradcodec.reference.bitpack import pack_bits, packed_nbytes, unpack_bits
from gradcodec.reference.hadamard import butterflies, sign_words


class RotatedPeaksPacker(RotatedPacker):
    """The signs and positions of the ``kept`` largest of every ``block`` rotated values.

        x [block] --H E H D--> y --largest--> body = seed | scales (bf16) | signs | positions

    As ``RotatedSignPacker``, but the values that are sent are chosen by their size, and ``x`` is
    rotated twice, with signs ``D`` and ``E``: one rotation makes equal magnitudes of a single loud
    value, whose largest say nothing. The scale ``|x|^2 / sum |y_kept|`` is unbiased for these too:
    the choice depends on ``|y|`` alone, so over all rotations the estimate has no direction but
    that of ``x``. For Gaussian ``y``, of which a
    share ``p = 2 Q(t)`` is above ``t``, the relative squared error is

        1 / rho^2 - 1,   rho^2 = (2 phi(t))^2 / p,   at p (1 + bits of a position) bits a value

    where a position takes about ``2 + log2(1 / p)`` bits (Elias-Fano). At the bytes of 1/4, 1/8 and
    1/16 of the first signs this is 4.0, 8.5 and 17 in place of 5.3, 11.6 and 24.1; no unbiased
    code can be below 2.4, 5.3 and 11 (the rate-distortion bound of a Gaussian, ``1 / (4^R - 1)``).

    Sources: the rotation and the scale are those of DRIVE (arXiv 2105.08339); that a sparse code of
    a rotated vector is closer to the bound at low rates follows from the entropy-coded threshold
    quantiser (Marco and Neuhoff 2006, Low-resolution scalar quantization for Gaussian sources).
    NaN and Inf raise ``NonFiniteError``. Torch computes it on every device.
    """

    def _positions(self, numel: int) -> Positions:
        block, kept = self.config.block, self.config.kept
        form = "bitmap" if 4 * kept > block else "elias-fano"  # the smaller of the two
        return Positions(form, self._blocks(numel) * block, kept, block)

    def nbytes(self, numel: int) -> int:
        """The seed, two bytes per scale, signs and positions, each rounded up to a byte."""
        positions = self._positions(numel)
        signs = packed_nbytes(positions.count, 1)
        return SEED_BYTES + 2 * self._blocks(numel) + signs + positions.nbytes

    @torch.no_grad()
    def pack(self, x: Tensor, *, seed: int = 0, residual: Tensor | None = None) -> Tensor:
        """As ``Packer.pack``, a segment at a time."""
        x = x.detach().float()
        layout.check_finite(x, "rotsign")
        seed &= 0xFFFFFFFF
        block, kept, n = self.config.block, self.config.kept, x.numel()
        blocks, positions = self._blocks(n), self._positions(n)
        words = self._words(n, seed, x.device)
        scales = torch.empty(blocks, dtype=torch.bfloat16, device=x.device)
        minus = torch.empty(blocks, kept, dtype=torch.bool, device=x.device)
        at = torch.empty(blocks, kept, dtype=torch.int64, device=x.device)
        lost = None if residual is None else torch.empty_like(x)
        segment = rotsign.segment_of(block)
        for start in range(0, n, segment):
            its = slice(start, start + segment)
            rows = rotsign.blocks_of(x[its], block, None if residual is None else residual[its])
            here = slice(start // block, start // block + len(rows))
            signs = [rotsign.signs_at(part, start, rows) for part in words]
            y, exponent = rotsign.rotated(rows, signs[0])
            y = butterflies(y.mul_(signs[1]))
            peaks, index = ops.topk_encode(y.view(-1), k=kept, chunk=block)
            scales[here] = rotsign.scales_of(y, peaks, exponent, 1.0 / block)
            minus[here] = peaks < 0
            at[here] = index.long()
            if lost is not None:
                rest = rows - self._decoded(minus[here], at[here], scales[here], signs)
                lost[its] = rest.view(-1)[: x[its].numel()]
        # The scale of a block with values near fp32's maximum may overflow.
        layout.check_finite(scales, "rotsign scales")
        if residual is not None and lost is not None:
            residual.copy_(lost)
        drawn = torch.tensor(list(seed.to_bytes(SEED_BYTES, "little")), dtype=torch.uint8)
        at = at.view(-1) + positions.starts(x.device)
        parts = [drawn.to(x.device), scales.view(torch.uint8), pack_bits(minus.view(-1), 1)]
        return torch.cat([*parts, positions.write(at)])

    def _packed(self, x: Tensor, seed: int) -> Tensor:
        return self.pack(x, seed=seed)

    def _unpacked(self, body: Tensor, numel: int) -> Tensor:
        block, kept, blocks = self.config.block, self.config.kept, self._blocks(numel)
        positions = self._positions(numel)
        begin = SEED_BYTES + 2 * blocks
        end = begin + packed_nbytes(positions.count, 1)
        scales = self._checked(body[SEED_BYTES:begin].clone().view(torch.bfloat16))
        seed = int.from_bytes(bytes(body[:SEED_BYTES].tolist()), "little")
        words = self._words(numel, seed, body.device)
        minus = unpack_bits(body[begin:end], 1, positions.count).view(blocks, kept).bool()
        at = positions.read(body[end:]) - positions.starts(body.device)
        at = at.view(blocks, kept)
        out = torch.empty(numel, device=body.device)
        segment = rotsign.segment_of(block)
        for start in range(0, numel, segment):
            part = out[start : start + segment]
            here = slice(start // block, start // block + self._blocks(part.numel()))
            like = part.new_empty(here.stop - here.start, block)
            signs = [rotsign.signs_at(its, start, like) for its in words]
            x = self._decoded(minus[here], at[here], scales[here], signs)
            part.copy_(x.view(-1)[: part.numel()])
        return out

    def _words(self, numel: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The signs of ``D``, then those of ``E``, as bits; each begins with a new word."""
        count = sign_words(self._blocks(numel) * self.config.block)
        words = ops.random_sign_words(2 * 64 * count, seed, device)
        return words[:count], words[count:]

    def _decoded(self, minus: Tensor, at: Tensor, scales: Tensor, signs: list[Tensor]) -> Tensor:
        """``D H E H y / block``, fp32 ``[blocks, block]``; signs, positions ``[blocks, kept]``."""
        levels = (1.0 - 2.0 * minus.float()) * (scales.float() / self.config.block)[:, None]
        y = torch.zeros_like(signs[0]).scatter_(1, at, levels)
        return butterflies(butterflies(y).mul_(signs[1])).mul_(signs[0])
