"""How one basis is stored: in a floating dtype, or in 8 or 4 bits with a scale per block.

    U [size, k] --columns--> blocks of 64 --> codes uint8 [k, bytes of a column], scales bf16

Blocks of 64 within a column have the smallest error for their bytes: on the two bundled codecs at
4 bits they lose 0.0097 and 0.0145 of the energy at 4.25 bits a value. One scale per column of 256
takes 4.06 bits and loses 0.0137 and 0.0255, although 0.19 bits less should only cost a factor of
1.3. Blocks of 32 and 128 are worse as well, and so are all of these at 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional

from gradcodec.errors import ConfigError
from gradcodec.reference import grid
from gradcodec.reference.bitpack import pack_bits, packed_nbytes, unpack_bits

BLOCK = 64
FLOATS: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
BITS: Mapping[str, int] = MappingProxyType({"int8": 8, "int4": 4})
BASIS_DTYPES = (*FLOATS, *BITS)


def quantise(basis: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``[size, k]`` -> packed codes uint8 ``[k, bytes]``, scales bf16 ``[k, blocks]``.

    Every column begins a new block and byte, so ``k`` and the sizes can be read off the shapes.
    """
    size, k = basis.shape
    columns = functional.pad(basis.T.float(), (0, -size % BLOCK))
    rows = columns.reshape(-1, BLOCK)
    scales = grid.deltas(rows, rows.new_full((len(rows),), BLOCK), bits, "absmax", False)
    codes = grid.codes_of(rows, scales, bits, None).view(columns.shape)[:, :size]
    codes = functional.pad(codes, (0, size % (8 // bits)))
    return pack_bits(codes.reshape(-1), bits).view(k, packed_nbytes(size, bits)), scales.view(
        k, -(-size // BLOCK)
    )


def dequantise(codes: Tensor, scales: Tensor | None, size: int, bits: int) -> Tensor:
    """Inverse of ``quantise``: fp32 ``[size, k]``, exact and equal on every machine.

    Raises:
        ConfigError: shapes, dtypes or scales that ``quantise`` does not make.
    """
    k = len(codes) if codes.ndim else 0
    width, blocks = packed_nbytes(size, bits), -(-size // BLOCK)
    if codes.dtype != torch.uint8 or codes.shape != (k, width):
        raise ConfigError(
            f"expected uint8 codes [k, {width}], got {codes.dtype} {list(codes.shape)}"
        )
    if scales is None or scales.dtype != torch.bfloat16 or scales.shape != (k, blocks):
        came = "none" if scales is None else f"{scales.dtype} {list(scales.shape)}"
        raise ConfigError(f"expected bfloat16 scales {[k, blocks]}, got {came}")
    # The lowest level must be finite too: it overflows fp32 if a scale is near bf16's maximum.
    lowest = scales.float() * (1 << bits - 1)
    if not bool((torch.isfinite(lowest) & (scales >= 0)).all()):
        raise ConfigError("expected scales that are not negative and levels that are finite")
    per_row = width * 8 // bits
    rows = unpack_bits(codes.reshape(-1), bits, k * per_row).view(k, per_row)[:, :size]
    rows = functional.pad(rows, (0, blocks * BLOCK - size))
    values = grid.values_of(rows.reshape(-1, BLOCK), scales.view(-1), bits)
    return values.view(k, blocks * BLOCK)[:, :size].T.contiguous()
