"""The quantising ops in C; results as in ``gradcodec.reference``, bit for bit.

Every function writes into ``out``, the outputs that the op's declaration made after its checks.
``library.at`` gives C the addresses, and checks the tensors' sizes once more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.native.library import at, current, typed
from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.grid import SCALES, padded_numel
from gradcodec.reference.hadamard import sign_words

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
    block: int,
    scale: str,
    rotate: bool,
    stochastic: bool,
    seed: int,
    residual: Tensor | None,
    levels: str,
    out: tuple[Tensor, Tensor],
) -> None:
    """``gradcodec.reference.encode.encode``.

    ``l1`` and ``rms`` are summed in fp64 but in another order, so a scale may differ in its last
    bit if it lies halfway between two bf16 numbers.
    """
    numel, total = values.numel(), padded_numel(values.numel(), rotate)
    current().call(
        "encode",
        *typed("values", values, numel),
        *(numel, total, bits, block, SCALES.index(scale), rotate, stochastic, seed & _MASK),
        *typed("residual", residual, total),
        levels == "gaussian",
        at("packed", out[0], packed_nbytes(total, bits), torch.uint8),
        at("scales", out[1], -(-total // block), torch.bfloat16),
    )


def decode_mean(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    *,
    bits: int,
    block: int,
    rotate: bool,
    weights: Tensor | None,
    levels: str,
    dtype: torch.dtype,
    out: Tensor,
) -> None:
    """``gradcodec.reference.decode_mean.decode_mean``."""
    total, world = padded_numel(numel, rotate), len(packed)
    nbytes, blocks = packed_nbytes(total, bits), -(-total // block)
    memory, its_dtype = typed("out", out, numel)
    current().call(
        "decode",
        at("packed", packed, world * nbytes, torch.uint8),
        nbytes,
        at("scales", scales, world * blocks, torch.bfloat16),
        *(blocks, world, at("weights", weights, world, torch.float32)),
        *(numel, total, bits, block, rotate, levels == "gaussian", its_dtype, memory),
    )


def lloyd_encode(
    values: Tensor, *, block: int, residual: Tensor | None, out: tuple[Tensor, Tensor]
) -> None:
    """``gradcodec.reference.two_means.encode``."""
    numel = values.numel()
    failed = current().call(
        "lloyd",
        *typed("values", values, numel),
        *(numel, block),
        *typed("residual", residual, numel),
        at("packed", out[0], packed_nbytes(numel, 2), torch.uint8),
        at("scales", out[1], 2 * -(-numel // block), torch.bfloat16),
    )
    if failed:
        raise MemoryError(f"no memory for a block of {block} values")


def lloyd_mean(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    *,
    block: int,
    weights: Tensor | None,
    out: Tensor,
) -> None:
    """``gradcodec.reference.two_means.decode_mean``."""
    world, nbytes, blocks = len(packed), packed_nbytes(numel, 2), -(-numel // block)
    current().call(
        "lloyd_mean",
        at("packed", packed, world * nbytes, torch.uint8),
        nbytes,
        at("scales", scales, 2 * world * blocks, torch.bfloat16),
        *(blocks, world, at("weights", weights, world, torch.float32), numel, block),
        at("out", out, numel, torch.float32),
    )


def rotsign_encode(
    values: Tensor,
    signs: Tensor,
    *,
    block: int,
    kept: int,
    residual: Tensor | None,
    out: tuple[Tensor, Tensor],
) -> None:
    """``gradcodec.reference.rotsign.encode``; scales may differ as in ``encode``."""
    numel, blocks = values.numel(), -(-values.numel() // block)
    current().call(
        "rotsign",
        *typed("values", values, numel),
        at("signs", signs, sign_words(blocks * block), torch.int64),
        *(numel, block, kept),
        *typed("residual", residual, numel),
        at("packed", out[0], packed_nbytes(blocks * kept, 1), torch.uint8),
        at("scales", out[1], blocks, torch.bfloat16),
    )


def rotsign_mean(
    packed: Tensor,
    scales: Tensor,
    signs: Tensor,
    numel: int,
    *,
    block: int,
    kept: int,
    weights: Tensor | None,
    out: Tensor,
) -> None:
    """``gradcodec.reference.rotsign.decode_mean``."""
    world, blocks = len(packed), -(-numel // block)
    nbytes, words = packed_nbytes(blocks * kept, 1), sign_words(blocks * block)
    current().call(
        "rotsign_mean",
        at("packed", packed, world * nbytes, torch.uint8),
        nbytes,
        at("scales", scales, world * blocks, torch.bfloat16),
        blocks,
        at("signs", signs, world * words, torch.int64),
        *(words, world, at("weights", weights, world, torch.float32), numel, block, kept),
        at("out", out, numel, torch.float32),
    )
