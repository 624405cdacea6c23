"""The quantising ops in C; arguments and results as in ``gradcodec.reference``, bit for bit.

Tensors are contiguous and on the CPU. What would let C read or write beyond memory is checked
here, the rest by ``gradcodec.ops``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.native.library import current
from gradcodec.native.memory import at, typed
from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.encode import padded_numel
from gradcodec.reference.grid import SCALES, check_grid, check_scale
from gradcodec.reference.hadamard import CHUNK

_MASK = (1 << 64) - 1


def random_bytes(start: int, count: int, seed: int) -> Tensor:
    """``gradcodec.reference.philox.random_bytes``; ``start`` a multiple of 16."""
    if start < 0 or count < 0 or start % 16:
        raise ConfigError(f"expected a start of whole 16s and a count, got {start} and {count}")
    out = torch.empty(count + 256, dtype=torch.uint8)  # whole groups of counters are written
    current().call("random_bytes", start, count, seed & _MASK, out.data_ptr())
    return out[:count]


def encode(
    values: Tensor,
    *,
    bits: int,
    block: int = CHUNK,
    scale: str = "absmax",
    rotate: bool = False,
    stochastic: bool = False,
    seed: int = 0,
    residual: Tensor | None = None,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``gradcodec.reference.encode.encode``.

    Sums of ``l1`` and ``rms`` are of fp64 in another order, so a scale may differ in its last bit
    where it lies halfway between two bf16 numbers.
    """
    check_grid(bits, block, rotate)
    check_scale(scale, bits)
    numel, total = values.numel(), padded_numel(values.numel(), rotate)
    packed, used = _outputs(total, bits, block)
    current().call(
        "encode",
        *typed("values", values, numel),
        *(numel, total, bits, block, SCALES.index(scale), rotate, stochastic, seed & _MASK),
        *typed("residual", residual, total),
        at("scales", scales, used.numel(), torch.bfloat16),
        packed.data_ptr(),
        used.data_ptr(),
    )
    return packed, used


def reduce_requant(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    *,
    bits: int,
    block: int = CHUNK,
    scale: str = "absmax",
    stochastic: bool = False,
    seed: int = 0,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``gradcodec.reference.reduce_requant.reduce_requant``, in one pass."""
    check_grid(bits, block)
    check_scale(scale, bits)
    world = _world(packed)
    out, used = _outputs(numel, bits, block)
    current().call(
        "reduce_requant",
        at("packed", packed, world * out.numel(), torch.uint8),
        out.numel(),
        at("scales", scales, world * used.numel(), torch.bfloat16),
        *(used.numel(), world, numel, bits, block, SCALES.index(scale), stochastic, seed & _MASK),
        *typed("residual", residual, numel),
        out.data_ptr(),
        used.data_ptr(),
    )
    return out, used


def chunk_absmax(
    values: Tensor, *, block: int = CHUNK, rotate: bool = False, residual: Tensor | None = None
) -> Tensor:
    """``gradcodec.reference.chunk_absmax.chunk_absmax``."""
    check_grid(8, block, rotate)
    numel, total = values.numel(), padded_numel(values.numel(), rotate)
    peaks = torch.empty(-(-total // block))
    current().call(
        "chunk_absmax",
        *typed("values", values, numel),
        *(numel, total, block, rotate),
        *typed("residual", residual, total),
        peaks.data_ptr(),
    )
    return peaks


def decode_mean(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    *,
    bits: int,
    block: int = CHUNK,
    rotate: bool = False,
    weights: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """``gradcodec.reference.decode_mean.decode_mean``.

    With ``out`` ``[numel]`` of ``dtype`` the result is written there. For large vectors that is
    several times faster: memory that the system has to hand out costs more than decoding.
    """
    return _decode(packed, scales, numel, bits, block, rotate, weights, dtype, out, shared=False)


def decode_sum_shared(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    *,
    bits: int,
    block: int = CHUNK,
    rotate: bool = False,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """As the oracle of this name; ``out`` as in ``decode_mean``."""
    return _decode(packed, scales, numel, bits, block, rotate, None, dtype, out, shared=True)


def _decode(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    bits: int,
    block: int,
    rotate: bool,
    weights: Tensor | None,
    dtype: torch.dtype,
    out: Tensor | None,
    shared: bool,
) -> Tensor:
    check_grid(bits, block, rotate)
    total, world = padded_numel(numel, rotate), _world(packed)
    if numel < 0:
        raise ConfigError(f"expected a number of values, got {numel}")
    # Before the memory for what is decoded, which is as large as `numel` says.
    nbytes, blocks = packed_nbytes(total, bits), -(-total // block)
    coded = at("packed", packed, world * nbytes, torch.uint8)
    deltas = at("scales", scales, blocks if shared else world * blocks, torch.bfloat16)
    shares = at("weights", weights, world, torch.float32)
    if out is None:
        out = torch.empty(numel, dtype=dtype)
    at("out", out, numel, dtype)
    memory, its_dtype = typed("out", out, numel)
    current().call(
        "decode",
        *(coded, nbytes, deltas, blocks, world, shares),
        *(numel, total, bits, block, rotate, shared, its_dtype, memory),
    )
    return out


def _world(packed: Tensor) -> int:
    """How many payloads there are: rows of ``packed [W, bytes]``."""
    if packed.ndim != 2 or not len(packed):
        raise ConfigError(f"packed: expected [W, bytes] with W >= 1, got {list(packed.shape)}")
    return len(packed)


def _outputs(total: int, bits: int, block: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(packed_nbytes(total, bits), dtype=torch.uint8),
        torch.empty(-(-total // block), dtype=torch.bfloat16),
    )
