"""Unsigned integers of a few bits <-> bytes, least significant bit first."""

from __future__ import annotations

import math

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
    per = 8 // math.gcd(bits, 8)
    if per * bits <= 56:
        # Widths that straddle bytes (indices): the fewest values that fill whole bytes, in a word.
        wide = torch.zeros(-(-values.numel() // per) * per, dtype=torch.int64, device=values.device)
        wide[: values.numel()] = values
        words = (wide.view(-1, per) << _places(per, bits, values.device)).sum(1)
        bytes_ = (words[:, None] >> _places(per * bits // 8, 8, values.device)).to(torch.uint8)
        return bytes_.reshape(-1)[: packed_nbytes(values.numel(), bits)]
    # Odd widths beyond 7: through a matrix of single bits.
    shifts = torch.arange(bits, device=values.device)
    stream = ((values.to(torch.int32)[:, None] >> shifts) & 1).reshape(-1)
    return pack_bits(stream, 1)


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Inverse of ``pack_bits``: uint8 ``[ceil(numel*bits/8)]`` -> int32 ``[numel]``."""
    if bits == 8:
        return packed[:numel].to(torch.int32)
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
        its = packed[: packed_nbytes(numel, bits)]
        lanes = (its[:, None] >> shifts) & ((1 << bits) - 1)
        return lanes.reshape(-1)[:numel].to(torch.int32)
    per = 8 // math.gcd(bits, 8)
    if per * bits <= 56:
        groups = -(-numel // per)
        size = per * bits // 8
        wide = torch.zeros(groups * size, dtype=torch.int64, device=packed.device)
        wide[: packed.numel()] = packed[: groups * size]
        words = (wide.view(-1, size) << _places(size, 8, packed.device)).sum(1)
        values = (words[:, None] >> _places(per, bits, packed.device)) & ((1 << bits) - 1)
        return values.reshape(-1)[:numel].to(torch.int32)
    stream = unpack_bits(packed, 1, numel * bits).view(numel, bits)
    weights = 2 ** torch.arange(bits, device=packed.device, dtype=torch.int32)
    return (stream * weights).sum(1, dtype=torch.int32)


def _places(count: int, bits: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * bits
