"""The ops as ``torch.library`` knows them: schemas, and shapes for fake tensors.

Ops are opaque to ``torch.compile`` and work under ``fullgraph=True``; what they write in place
(residuals) is declared. Implementations are registered in ``gradcodec.ops.backends``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gradcodec.reference.bitpack import packed_nbytes
from gradcodec.reference.encode import padded_numel
from gradcodec.reference.hadamard import CHUNK

NAMESPACE = "gradcodec"

_SCHEMAS = {
    "encode": "(Tensor values, int bits, int block, str scale, bool rotate, bool stochastic, "
    "int seed, Tensor(a!)? residual, Tensor? scales) -> (Tensor, Tensor)",
    "decode_mean": "(Tensor packed, Tensor scales, int numel, int bits, int block, bool rotate, "
    "Tensor? weights, ScalarType dtype) -> Tensor",
    "decode_sum_shared": "(Tensor packed, Tensor scales, int numel, int bits, int block, "
    "bool rotate, ScalarType dtype) -> Tensor",
    "reduce_requant": "(Tensor packed, Tensor scales, int numel, int bits, int block, str scale, "
    "bool stochastic, int seed, Tensor(a!)? residual) -> (Tensor, Tensor)",
    "chunk_absmax": "(Tensor values, int block, bool rotate, Tensor? residual) -> Tensor",
    "topk_encode": "(Tensor values, int k, int chunk, Tensor(a!)? residual) -> (Tensor, Tensor)",
    "top_rows": "(Tensor values, int k, Tensor(a!)? residual) -> (Tensor, Tensor)",
    "sparse_mean": "(Tensor kept, Tensor index, int numel, int chunk) -> Tensor",
    "project_quantise": "(Tensor grad, Tensor left, Tensor? right, int bits, int block, str scale) "
    "-> (Tensor, Tensor, Tensor)",
}

NAMES = tuple(_SCHEMAS)


def _define() -> None:
    for name, schema in _SCHEMAS.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema)


def _coded(like: Tensor, total: int, bits: int, block: int) -> tuple[Tensor, Tensor]:
    return (
        like.new_empty(packed_nbytes(total, bits), dtype=torch.uint8),
        like.new_empty(-(-total // block), dtype=torch.bfloat16),
    )


def _encode(
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
    return _coded(values, padded_numel(values.numel(), rotate), bits, block)


def _decode_mean(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    bits: int,
    block: int,
    rotate: bool,
    weights: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(numel, dtype=dtype)


def _decode_sum_shared(
    packed: Tensor,
    scales: Tensor,
    numel: int,
    bits: int,
    block: int,
    rotate: bool,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(numel, dtype=dtype)


def _reduce_requant(
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
    return _coded(packed, numel, bits, block)


def _chunk_absmax(values: Tensor, block: int, rotate: bool, residual: Tensor | None) -> Tensor:
    total = padded_numel(values.numel(), rotate)
    return values.new_empty(-(-total // block), dtype=torch.float32)


def _topk_encode(
    values: Tensor, k: int, chunk: int, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (-(-values.numel() // chunk), k)
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.int16)


def _top_rows(values: Tensor, k: int, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = (-(-values.numel() // 64), k)
    return values.new_empty(shape), values.new_empty(shape, dtype=torch.uint8)


def _sparse_mean(kept: Tensor, index: Tensor, numel: int, chunk: int) -> Tensor:
    return kept.new_empty(numel, dtype=torch.float32)


def _project_quantise(
    grad: Tensor, left: Tensor, right: Tensor | None, bits: int, block: int, scale: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = left.shape[1], grad.shape[1] if right is None else right.shape[1]
    packed, scales = _coded(grad, rows * columns, bits, block)
    return packed, scales, grad.new_empty(rows, columns, dtype=torch.float32)


FAKES: dict[str, Callable[..., Any]] = {
    "encode": _encode,
    "decode_mean": _decode_mean,
    "decode_sum_shared": _decode_sum_shared,
    "reduce_requant": _reduce_requant,
    "chunk_absmax": _chunk_absmax,
    "topk_encode": _topk_encode,
    "top_rows": _top_rows,
    "sparse_mean": _sparse_mean,
    "project_quantise": _project_quantise,
}

_define()
for _name, _fake in FAKES.items():
    torch.library.register_fake(f"{NAMESPACE}::{_name}")(_fake)

__all__ = ["CHUNK", "FAKES", "NAMES", "NAMESPACE"]
