"""The ops, each declared once: what it takes, what it refuses, what comes out.

The maths of an op is in the function of ``gradcodec.reference`` that its docstring names.
``gradcodec.ops.declare`` says what is derived from a declaration.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.ops.checks import (
    check_numel,
    check_payloads,
    check_residual,
    check_shape,
    check_vector,
)
from gradcodec.ops.declare import op
from gradcodec.reference import decode_mean as _decode_mean
from gradcodec.reference import encode as _encode
from gradcodec.reference import grid
from gradcodec.reference import rotsign as _rotsign
from gradcodec.reference import sparse_mean as _sparse_mean
from gradcodec.reference import top_rows as _top_rows
from gradcodec.reference import topk_encode as _topk_encode
from gradcodec.reference import two_means as _two_means
from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.grid import padded_numel
from gradcodec.reference.hadamard import CHUNK, sign_words
from gradcodec.reference.top_rows import ROW

Impl = Literal["reference", "native", "triton"]


@op(_encode.encode)
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
    levels: str = "uniform",
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise values to the levels of blocks: ``gradcodec.reference.encode.encode``."""
    check_vector("values", values)
    grid.check_grid(bits, block, rotate)
    grid.check_scale(scale, bits)
    grid.check_levels(levels, bits, stochastic)
    total = padded_numel(values.numel(), rotate)
    check_residual(residual, total, values)
    return _coded(values, total * bits, -(-total // block))


@op(_decode_mean.decode_mean)
def decode_mean(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    *,
    bits: int,
    block: int = CHUNK,
    rotate: bool = False,
    weights: Tensor | None = None,
    levels: str = "uniform",
    dtype: torch.dtype = torch.float32,
    impl: Impl | None = None,
) -> Tensor:
    """Mean of what ``encode`` made: ``gradcodec.reference.decode_mean.decode_mean``."""
    grid.check_grid(bits, block, rotate)
    grid.check_levels(levels, bits)
    check_numel(numel)
    total = padded_numel(numel, rotate)
    check_payloads(packed, scales, total * bits, -(-total // block), weights)
    return torch.empty(numel, dtype=dtype, device=packed.device)


@op(_two_means.encode)
def lloyd_encode(
    values: Tensor, *, block: int, residual: Tensor | None = None, impl: Impl | None = None
) -> tuple[Tensor, Tensor]:
    """Two bits with two fitted magnitudes: ``gradcodec.reference.two_means.encode``."""
    check_vector("values", values)
    grid.check_grid(2, block)
    check_residual(residual, values.numel(), values)
    return _coded(values, 2 * values.numel(), -(-values.numel() // block), 2)


@op(_two_means.decode_mean)
def lloyd_mean(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    *,
    block: int,
    weights: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Mean of what ``lloyd_encode`` made: ``gradcodec.reference.two_means.decode_mean``."""
    grid.check_grid(2, block)
    check_numel(numel)
    check_payloads(packed, scales, 2 * numel, 2 * -(-numel // block), weights)
    return torch.empty(numel, dtype=torch.float32, device=packed.device)


@op(_rotsign.encode)
def rotsign_encode(
    values: Tensor,
    signs: Tensor,
    *,
    block: int,
    kept: int,
    residual: Tensor | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """Signs of rotated blocks: ``gradcodec.reference.rotsign.encode``."""
    check_vector("values", values)
    blocks = _blocks_of_signs(values.numel(), block, kept)
    check_shape("signs", signs, (sign_words(blocks * block),), torch.int64)
    check_residual(residual, values.numel(), values)
    return _coded(values, blocks * kept, blocks)


@op(_rotsign.decode_mean)
def rotsign_mean(
    packed: Tensor,
    scales: Tensor,
    signs: Tensor,
    numel: int,
    *,
    block: int,
    kept: int,
    weights: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """Mean of what ``rotsign_encode`` made: ``gradcodec.reference.rotsign.decode_mean``."""
    check_numel(numel)
    blocks = _blocks_of_signs(numel, block, kept)
    check_payloads(packed, scales, blocks * kept, blocks, weights)
    check_shape("signs", signs, (len(packed), sign_words(blocks * block)), torch.int64)
    return torch.empty(numel, dtype=torch.float32, device=packed.device)


@op(_topk_encode.topk_encode)
def topk_encode(
    values: Tensor,
    *,
    k: int,
    chunk: int = CHUNK,
    residual: Tensor | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of every chunk: ``gradcodec.reference.topk_encode.topk_encode``."""
    check_vector("values", values)
    if not 2 <= chunk <= 1 << 16 or not 1 <= k <= chunk:
        raise ConfigError(f"expected 1 <= k <= chunk <= {1 << 16}, got k={k}, chunk={chunk}")
    check_residual(residual, values.numel(), values)
    return _kept(values, -(-values.numel() // chunk), k, torch.int16)


@op(_top_rows.top_rows)
def top_rows(
    values: Tensor, *, k: int = 1, residual: Tensor | None = None, impl: Impl | None = None
) -> tuple[Tensor, Tensor]:
    """The largest one or two of every 64: ``gradcodec.reference.top_rows.top_rows``."""
    check_vector("values", values)
    if k not in (1, 2):
        raise ConfigError(f"expected k of 1 or 2 in every row of {ROW}, got {k!r}")
    check_residual(residual, values.numel(), values)
    return _kept(values, -(-values.numel() // ROW), k, torch.uint8)


@op(_sparse_mean.sparse_mean)
def sparse_mean(
    kept: Tensor, index: Tensor, numel: int, *, chunk: int = CHUNK, impl: Impl | None = None
) -> Tensor:
    """Mean of what ``topk_encode`` made: ``gradcodec.reference.sparse_mean.sparse_mean``."""
    if not 1 <= chunk <= 1 << 16 or index.is_floating_point():
        raise ConfigError(
            f"expected a chunk of 1..{1 << 16} and whole positions, got {chunk}, {index.dtype}"
        )
    check_numel(numel)
    chunks = -(-numel // chunk)
    if kept.dim() != 3 or kept.shape != index.shape or kept.shape[1] != chunks or not len(kept):
        raise ConfigError(
            f"expected values and positions [W, {chunks}, k] with W >= 1, got "
            f"{list(kept.shape)} and {list(index.shape)}"
        )
    return torch.empty(numel, dtype=torch.float32, device=kept.device)


def _blocks_of_signs(numel: int, block: int, kept: int) -> int:
    """Number of blocks; checks that ``block`` is a power of two and ``kept`` is within it."""
    if not 8 <= block <= CHUNK or block & (block - 1) or not 1 <= kept <= block:
        raise ConfigError(
            f"expected a block of a power of two, 8..{CHUNK}, and 1 <= kept <= block, got "
            f"block={block}, kept={kept}"
        )
    return -(-numel // block)


def _coded(like: Tensor, bits: int, *blocks: int) -> tuple[Tensor, Tensor]:
    """Packed bits and bf16 scales of these dimensions."""
    return (
        torch.empty(packed_nbytes(bits, 1), dtype=torch.uint8, device=like.device),
        torch.empty(blocks, dtype=torch.bfloat16, device=like.device),
    )


def _kept(like: Tensor, rows: int, k: int, places: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(rows, k, dtype=like.dtype, device=like.device),
        torch.empty(rows, k, dtype=places, device=like.device),
    )
