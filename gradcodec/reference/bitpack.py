"""Unsigned integers of a few bits <-> bytes, least significant bit first."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_nbytes(numel: int, bits: int) -> int:
    """Bytes that ``numel`` values of ``bits`` bits take: ``ceil(numel * bits / 8)``."""
    return (numel * bits + 7) // 8


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack ``values`` ``[n]`` (integers below ``2**bits``) into uint8 ``[ceil(n*bits/8)]``.

    Value ``i`` occupies the stream's bits ``[i*bits, (i+1)*bits)``; bit ``j`` of the stream is bit
    ``j % 8`` of byte ``j // 8``. Padding bits are zero.
    """
    if bits == 8:
        return values.to(torch.uint8)
    if 8 % bits == 0:
        per = 8 // bits
        padded = torch.zeros(
            -(-values.numel() // per) * per, dtype=torch.uint8, device=values.device
        )
        padded[: values.numel()] = values.to(torch.uint8)
        lanes = padded.view(-1, per)
        out = lanes[:, 0].clone()
        for lane in range(1, per):
            out |= lanes[:, lane] << (lane * bits)
        return out
    # Widths that straddle bytes (indices): through a matrix of single bits.
    shifts = torch.arange(bits, device=values.device)
    stream = ((values.to(torch.int32)[:, None] >> shifts) & 1).reshape(-1)
    return pack_bits(stream, 1)


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Inverse of ``pack_bits``: uint8 ``[ceil(numel*bits/8)]`` -> int32 ``[numel]``."""
    if bits == 8:
        return packed[:numel].to(torch.int32)
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        lanes = (packed[:, None] >> shifts) & ((1 << bits) - 1)
        return lanes.reshape(-1)[:numel].to(torch.int32)
    stream = unpack_bits(packed, 1, numel * bits).view(numel, bits)
    weights = 2 ** torch.arange(bits, device=packed.device, dtype=torch.int32)
    return (stream * weights).sum(1, dtype=torch.int32)
