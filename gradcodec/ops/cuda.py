"""The Triton kernels behind the signatures of the oracles: outputs made, constants at hand.

The only importer of ``gradcodec_kernels``, and only when an op is first asked of it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.ops.schemas import FAKES
from gradcodec.reference.hadamard import CHUNK, rotation_factors
from gradcodec_kernels import chunk_absmax as _chunk_absmax
from gradcodec_kernels import decode_mean as _decode_mean
from gradcodec_kernels import decode_sum_shared as _decode_sum_shared
from gradcodec_kernels import encode as _encode
from gradcodec_kernels import project_quantise as _project_quantise
from gradcodec_kernels import reduce_requant as _reduce_requant
from gradcodec_kernels import sparse_mean as _sparse_mean
from gradcodec_kernels import top_rows as _top_rows
from gradcodec_kernels import topk_encode as _topk_encode


def encode(
    values: Tensor,
    bits: int,
    block: int,
    scale: str,
    rotate: bool,
    stochastic: bool,
    seed: int,
    residual: Tensor | None,
    scales: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As the oracle; with rotation in bf16, see ``reference.hadamard.rotate_chunks``."""
    _check_block(block)
    packed, used = FAKES["encode"](
        values, bits, block, scale, rotate, stochastic, seed, residual, scales
    )
    if scales is not None:
        used.copy_(scales)
    _encode.encode(
        values,
        packed,
        used,
        bits=bits,
        block=block,
        scale="given" if scales is not None else scale,
        rotation=_rotation(values, rotate),
        stochastic=stochastic,
        seed=seed,
        residual=residual,
    )
    return packed, used


def decode_mean(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    bits: int,
    block: int,
    rotate: bool,
    weights: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """As the oracle."""
    _check_block(block)
    out = packed.new_empty(numel, dtype=dtype)
    rotation = _rotation(packed, rotate)
    _decode_mean.decode_mean(
        packed, scales, out, bits=bits, block=block, rotation=rotation, weights=weights
    )
    return out


def decode_sum_shared(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    bits: int,
    block: int,
    rotate: bool,
    dtype: torch.dtype,
) -> Tensor:
    """As the oracle."""
    _check_block(block)
    out = packed.new_empty(numel, dtype=dtype)
    rotation = _rotation(packed, rotate)
    _decode_sum_shared.decode_sum_shared(
        packed, scales, out, bits=bits, block=block, rotation=rotation
    )
    return out


def reduce_requant(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    bits: int,
    block: int,
    scale: str,
    stochastic: bool,
    seed: int,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As the oracle."""
    _check_block(block)
    out, used = FAKES["reduce_requant"](
        packed, scales, numel, bits, block, scale, stochastic, seed, residual
    )
    _reduce_requant.reduce_requant(
        packed,
        scales,
        out,
        used,
        numel,
        bits=bits,
        block=block,
        scale=scale,
        stochastic=stochastic,
        seed=seed,
        residual=residual,
    )
    return out, used


def chunk_absmax(values: Tensor, block: int, rotate: bool, residual: Tensor | None) -> Tensor:
    """As the oracle."""
    _check_block(block)
    out: Tensor = FAKES["chunk_absmax"](values, block, rotate, residual)
    rotation = _rotation(values, rotate)
    _chunk_absmax.chunk_absmax(values, out, block=block, rotation=rotation, residual=residual)
    return out


def topk_encode(
    values: Tensor, k: int, chunk: int, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As the oracle."""
    if chunk > _topk_encode.MAX_CHUNK:
        raise ConfigError(
            f"topk_encode on a GPU: expected a chunk of at most {_topk_encode.MAX_CHUNK}, "
            f"got {chunk}; impl='reference' takes it"
        )
    kept, index = FAKES["topk_encode"](values, k, chunk, residual)
    _topk_encode.topk_encode(values, kept, index, k=k, chunk=chunk, residual=residual)
    return kept, index


def top_rows(values: Tensor, k: int, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """As the oracle."""
    kept, index = FAKES["top_rows"](values, k, residual)
    _top_rows.top_rows(values, kept, index, k=k, residual=residual)
    return kept, index


def sparse_mean(kept: Tensor, index: Tensor, numel: int, chunk: int) -> Tensor:
    """As the oracle."""
    out = kept.new_empty(numel, dtype=torch.float32)
    _sparse_mean.sparse_mean(kept, index, out, chunk=chunk)
    return out


def project_quantise(
    grad: Tensor, left: Tensor, right: Tensor | None, bits: int, block: int, scale: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As the oracle, to the rounding of its products."""
    _check_block(block)
    packed, scales, code = FAKES["project_quantise"](grad, left, right, bits, block, scale)
    _project_quantise.project_quantise(
        grad, left, packed, scales, code, bits=bits, block=block, scale=scale, right=right
    )
    return packed, scales, code


def _check_block(block: int) -> None:
    if not 64 <= block <= CHUNK or block & (block - 1):
        raise ConfigError(
            f"on a GPU: expected a block of a power of two, 64..{CHUNK}, got {block}; "
            "impl='reference' takes it"
        )


def _rotation(like: Tensor, rotate: bool) -> tuple[Tensor, Tensor] | None:
    return _factors(like.device) if rotate else None


@functools.cache
def _factors(device: torch.device) -> tuple[Tensor, Tensor]:
    left, right = rotation_factors(device)
    return left.to(torch.bfloat16).contiguous(), right.to(torch.bfloat16).contiguous()
