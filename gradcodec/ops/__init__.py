"""Quantise, pack, decode and average flat vectors: one public function for each op.

    import gradcodec.ops as ops
    packed, scales = ops.encode(gradient.view(-1), bits=4, rotate=True, residual=residual)

The maths is in ``gradcodec.reference``, function by function under the same names. ``impl`` says
who computes: ``"reference"`` (torch, any device), ``"native"`` (C, CPU) or ``"triton"`` (CUDA);
``None`` takes the device's own, which ``implementation(device)`` names and ``gradcodec info``
prints. Asking for one that is not there is a ``ConfigError`` with the reason; nothing falls back
without a word.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.ops import backends
from gradcodec.ops.backends import implementation, status
from gradcodec.reference import grid
from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.encode import padded_numel
from gradcodec.reference.hadamard import CHUNK

Impl = Literal["reference", "native", "triton"]

__all__ = [
    "CHUNK",
    "Impl",
    "chunk_absmax",
    "decode_mean",
    "decode_sum_shared",
    "encode",
    "implementation",
    "packed_nbytes",
    "padded_numel",
    "project_quantise",
    "reduce_requant",
    "sparse_mean",
    "status",
    "top_rows",
    "topk_encode",
]


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
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``gradcodec.reference.encode.encode``; raises ``ConfigError`` for what does not fit."""
    _check_vector("values", values)
    grid.check_grid(bits, block, rotate)
    grid.check_scale(scale, bits)
    total = padded_numel(values.numel(), rotate)
    _check_residual(residual, total, values)
    if scales is not None:
        _check_shape("scales", scales, (-(-total // block),), torch.bfloat16)
    op = backends.pick("encode", values.device, impl)
    found: tuple[Tensor, Tensor] = op(
        values.contiguous(), bits, block, scale, rotate, stochastic, _int64(seed), residual, scales
    )
    return found


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
    impl: Impl | None = None,
) -> Tensor:
    """See ``gradcodec.reference.decode_mean.decode_mean``."""
    grid.check_grid(bits, block, rotate)
    _check_payloads(packed, scales, padded_numel(numel, rotate), bits, block)
    if weights is not None:
        _check_shape("weights", weights, (len(packed),), torch.float32)
    op = backends.pick("decode_mean", packed.device, impl)
    mean: Tensor = op(
        packed.contiguous(), scales.contiguous(), numel, bits, block, rotate, weights, dtype
    )
    return mean


def decode_sum_shared(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    *,
    bits: int,
    block: int = CHUNK,
    rotate: bool = False,
    dtype: torch.dtype = torch.float32,
    impl: Impl | None = None,
) -> Tensor:
    """See ``gradcodec.reference.decode_sum_shared.decode_sum_shared``."""
    grid.check_grid(bits, block, rotate)
    total = padded_numel(numel, rotate)
    _check_shape("scales", scales, (-(-total // block),), torch.bfloat16)
    _check_payloads(packed, scales.expand(max(1, len(packed)), -1), total, bits, block)
    op = backends.pick("decode_sum_shared", packed.device, impl)
    mean: Tensor = op(packed.contiguous(), scales.contiguous(), numel, bits, block, rotate, dtype)
    return mean


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
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``gradcodec.reference.reduce_requant.reduce_requant``."""
    grid.check_grid(bits, block, False)
    grid.check_scale(scale, bits)
    _check_payloads(packed, scales, numel, bits, block)
    _check_residual(residual, numel, packed)
    op = backends.pick("reduce_requant", packed.device, impl)
    found: tuple[Tensor, Tensor] = op(
        packed.contiguous(),
        scales.contiguous(),
        numel,
        bits,
        block,
        scale,
        stochastic,
        _int64(seed),
        residual,
    )
    return found


def chunk_absmax(
    values: Tensor,
    *,
    block: int = CHUNK,
    rotate: bool = False,
    residual: Tensor | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """See ``gradcodec.reference.chunk_absmax.chunk_absmax``."""
    _check_vector("values", values)
    grid.check_grid(8, block, rotate)
    _check_residual(residual, padded_numel(values.numel(), rotate), values)
    op = backends.pick("chunk_absmax", values.device, impl)
    peaks: Tensor = op(values.contiguous(), block, rotate, residual)
    return peaks


def topk_encode(
    values: Tensor,
    *,
    k: int,
    chunk: int = CHUNK,
    residual: Tensor | None = None,
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``gradcodec.reference.topk_encode.topk_encode``."""
    _check_vector("values", values)
    if not 2 <= chunk <= 1 << 16 or not 1 <= k <= chunk:
        raise ConfigError(f"expected 1 <= k <= chunk <= {1 << 16}, got k={k}, chunk={chunk}")
    _check_residual(residual, values.numel(), values)
    op = backends.pick("topk_encode", values.device, impl)
    found: tuple[Tensor, Tensor] = op(values.contiguous(), k, chunk, residual)
    return found


def top_rows(
    values: Tensor, *, k: int = 1, residual: Tensor | None = None, impl: Impl | None = None
) -> tuple[Tensor, Tensor]:
    """See ``gradcodec.reference.top_rows.top_rows``."""
    _check_vector("values", values)
    if k not in (1, 2):
        raise ConfigError(f"expected k of 1 or 2 in every row of 64, got {k!r}")
    _check_residual(residual, values.numel(), values)
    op = backends.pick("top_rows", values.device, impl)
    found: tuple[Tensor, Tensor] = op(values.contiguous(), k, residual)
    return found


def sparse_mean(
    kept: Tensor, index: Tensor, numel: int, *, chunk: int = CHUNK, impl: Impl | None = None
) -> Tensor:
    """See ``gradcodec.reference.sparse_mean.sparse_mean``."""
    if not 1 <= chunk <= 1 << 16 or index.is_floating_point():
        raise ConfigError(
            f"expected a chunk of 1..{1 << 16} and whole positions, got {chunk}, {index.dtype}"
        )
    chunks = -(-numel // chunk)
    if kept.dim() != 3 or kept.shape != index.shape or kept.shape[1] != chunks or not len(kept):
        raise ConfigError(
            f"expected values and positions [W, {chunks}, k] with W >= 1, got "
            f"{list(kept.shape)} and {list(index.shape)}"
        )
    op = backends.pick("sparse_mean", kept.device, impl)
    mean: Tensor = op(kept.contiguous(), index.contiguous(), numel, chunk)
    return mean


def project_quantise(
    grad: Tensor,
    left: Tensor,
    right: Tensor | None = None,
    *,
    bits: int,
    block: int = CHUNK,
    scale: str = "absmax",
    impl: Impl | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``gradcodec.reference.project_quantise.project_quantise``."""
    grid.check_grid(bits, block, False)
    grid.check_scale(scale, bits)
    if (
        grad.dim() != 2
        or left.dim() != 2
        or len(left) != len(grad)
        or (right is not None and (right.dim() != 2 or len(right) != grad.shape[1]))
    ):
        came = [list(t.shape) for t in (grad, left, right) if t is not None]
        raise ConfigError(f"expected shapes [m, n], [m, r] and perhaps [n, s], got {came}")
    op = backends.pick("project_quantise", grad.device, impl)
    found: tuple[Tensor, Tensor, Tensor] = op(grad, left, right, bits, block, scale)
    return found


def _int64(seed: int) -> int:
    """The 64 bits of a seed as the signed number that an op's schema takes."""
    low = seed & 0xFFFFFFFFFFFFFFFF
    return low - (1 << 64) if low >> 63 else low


def _check_vector(what: str, tensor: Tensor) -> None:
    if tensor.dim() != 1 or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"{what}: expected one dimension of float32, bfloat16 or float16, got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )


def _check_residual(residual: Tensor | None, numel: int, like: Tensor) -> None:
    if residual is None:
        return
    _check_vector("residual", residual)
    fits = residual.numel() == numel and residual.is_contiguous()
    if not fits or residual.device != like.device:
        raise ConfigError(
            f"residual: expected {numel} contiguous values on {like.device}, got "
            f"{residual.numel()} on {residual.device}"
        )


def _check_shape(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ConfigError(
            f"{what}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )


def _check_payloads(packed: Tensor, scales: Tensor, total: int, bits: int, block: int) -> None:
    if packed.dim() != 2 or not len(packed):
        raise ConfigError(f"packed: expected [W, bytes] with W >= 1, got {list(packed.shape)}")
    world = len(packed)
    _check_shape("packed", packed, (world, packed_nbytes(total, bits)), torch.uint8)
    _check_shape("scales", scales, (world, -(-total // block)), torch.bfloat16)
