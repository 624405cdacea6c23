"""The calls that are timed on a GPU: every kernel as ``variants.VARIANTS`` compiles it, and peers.

A case is made for a number of values on a device: buffers are allocated, and what comes back is the
call to be timed and the bytes that it must read and write, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradcodec.reference.encode import encode as encode_by_torch
from gradcodec.reference.hadamard import CHUNK, random_sign_words, rotation_factors
from gradcodec_kernels.decode_mean import decode_mean
from gradcodec_kernels.encode import encode
from gradcodec_kernels.lloyd_encode import lloyd_encode
from gradcodec_kernels.lloyd_mean import lloyd_mean
from gradcodec_kernels.rotsign_encode import rotsign_encode
from gradcodec_kernels.rotsign_mean import rotsign_mean
from gradcodec_kernels.sign_words import sign_words
from gradcodec_kernels.sparse_mean import sparse_mean
from gradcodec_kernels.top_rows import top_rows
from gradcodec_kernels.topk_encode import topk_encode

BLOCK = 256
"""Of what has blocks of its own."""

Timed = tuple[Callable[[], Any], int]
Make = Callable[[int, torch.device], Timed]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _rotation(device: torch.device) -> tuple[Tensor, Tensor]:
    left, right = (f.to(device, torch.bfloat16).contiguous() for f in rotation_factors())
    return left, right


def _payloads(world: int, numel: int, bits: int, device: torch.device) -> Tensor:
    shape = (world, numel * bits // 8)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=device)


def _steps(*shape: int, device: torch.device) -> Tensor:
    return (torch.rand(shape, device=device) + 0.1).to(torch.bfloat16)


def _encode(
    bits: int,
    dtype: str = "bf16",
    *,
    block: int = CHUNK,
    scale: str = "absmax",
    rotate: bool = False,
    stochastic: bool = False,
    ef: bool = False,
    tail: int = 0,
    levels: str = "uniform",
) -> Make:
    def make(numel: int, device: torch.device) -> Timed:
        values = torch.randn(numel, device=device, dtype=DTYPES[dtype])[: numel - tail]
        residual = torch.randn_like(values.new_empty(numel)) * 0.1 if ef else None
        packed = torch.empty(numel * bits // 8, dtype=torch.uint8, device=device)
        scales = _steps(numel // block, device=device)
        rotation = _rotation(device) if rotate else None

        def call() -> None:
            encode(
                values,
                packed,
                scales,
                bits=bits,
                block=block,
                scale=scale,
                rotation=rotation,
                stochastic=stochastic,
                seed=1,
                residual=residual,
                levels=levels,
            )

        return call, _bytes(values, residual, residual, packed, scales)

    return make


def _decode(
    world: int,
    bits: int,
    out: str = "bf16",
    *,
    block: int = CHUNK,
    rotate: bool = False,
    weighted: bool = False,
    apart: int = 0,
    levels: str = "uniform",
) -> Make:
    def make(numel: int, device: torch.device) -> Timed:
        packed = _payloads(world, numel + 8 * apart // bits, bits, device)[:, : numel * bits // 8]
        scales = _steps(world, numel // block, device=device)
        weights = torch.rand(world, device=device) if weighted else None
        result = torch.empty(numel, dtype=DTYPES[out], device=device)
        rotation = _rotation(device) if rotate else None

        def call() -> None:
            decode_mean(
                packed,
                scales,
                result,
                bits=bits,
                block=block,
                rotation=rotation,
                weights=weights,
                levels=levels,
            )

        return call, _bytes(packed, scales, result)

    return make


def _levels(*, ef: bool) -> Make:
    def make(numel: int, device: torch.device) -> Timed:
        values = torch.randn(numel, device=device)
        residual = torch.zeros_like(values) if ef else None
        packed = torch.empty(numel // 4, dtype=torch.uint8, device=device)
        levels = _steps(numel // BLOCK, 2, device=device)

        def call() -> None:
            lloyd_encode(values, packed, levels, block=BLOCK, residual=residual)

        return call, _bytes(values, residual, residual, packed, levels)

    return make


def _mean_of_levels(numel: int, device: torch.device) -> Timed:
    packed = _payloads(8, numel, 2, device)
    levels = _steps(8, 2 * numel // BLOCK, device=device)
    out = torch.empty(numel, device=device)
    return lambda: lloyd_mean(packed, levels, out, block=BLOCK), _bytes(packed, levels, out)


def _signs(kept: int, *, ef: bool) -> Make:
    def make(numel: int, device: torch.device) -> Timed:
        values = torch.randn(numel, device=device)
        residual = torch.zeros_like(values) if ef else None
        signs = random_sign_words(numel, 1).to(device)
        packed = torch.empty(numel // BLOCK * kept // 8, dtype=torch.uint8, device=device)
        scales = _steps(numel // BLOCK, device=device)

        def call() -> None:
            rotsign_encode(values, signs, packed, scales, block=BLOCK, kept=kept, residual=residual)

        return call, _bytes(values, residual, residual, signs, packed, scales)

    return make


def _mean_of_signs(numel: int, device: torch.device) -> Timed:
    packed = _payloads(8, numel, 1, device)
    scales = _steps(8, numel // BLOCK, device=device)
    signs = random_sign_words(8 * numel, 1).view(8, -1).to(device)
    out = torch.empty(numel, device=device)

    def call() -> None:
        rotsign_mean(packed, scales, signs, out, block=BLOCK, kept=BLOCK)

    return call, _bytes(packed, scales, signs, out)


def _topk(dtype: str, *, ef: bool) -> Make:
    def make(numel: int, device: torch.device) -> Timed:
        values = torch.randn(numel, dtype=DTYPES[dtype], device=device)
        residual = torch.randn_like(values) if ef else None
        kept = values.new_empty(numel // CHUNK, 64)
        index = torch.empty(kept.shape, dtype=torch.int16, device=device)

        def call() -> None:
            topk_encode(values, kept, index, k=64, chunk=CHUNK, residual=residual)

        return call, _bytes(values, residual, residual, kept, index)

    return make


def _rows(k: int) -> Make:
    def make(numel: int, device: torch.device) -> Timed:
        values = torch.randn(numel, dtype=torch.bfloat16, device=device)
        residual = torch.randn_like(values)
        kept = values.new_empty(numel // 64, k)
        index = torch.empty(kept.shape, dtype=torch.uint8, device=device)

        def call() -> None:
            top_rows(values, kept, index, k=k, residual=residual)

        return call, _bytes(values, residual, residual, kept, index)

    return make


def _sparse(numel: int, device: torch.device) -> Timed:
    kept = torch.randn(8, numel // CHUNK, 64, device=device).to(torch.bfloat16)
    # One position in every 64: no two are equal.
    index = torch.randint(0, 64, kept.shape, device=device) + 64 * torch.arange(64, device=device)
    index, out = index.to(torch.int16), torch.empty(numel, device=device)
    return lambda: sparse_mean(kept, index, out, chunk=CHUNK), _bytes(kept, index, out)


def _words(numel: int, device: torch.device) -> Timed:
    out = torch.empty(numel // 64, dtype=torch.int64, device=device)
    return lambda: sign_words(out, state=1, increment=3), _bytes(out)


_ROTATED: dict[str, Any] = {"rotate": True, "stochastic": True, "ef": True}
_GAUSSIAN: dict[str, Any] = {"rotate": True, "levels": "gaussian"}

#: By the names of ``variants.VARIANTS``.
KERNELS: Mapping[str, Make] = {
    "encode 4 bits, rotated, dithered, EF, bf16": _encode(4, **_ROTATED),
    "encode 4 bits, rotated, dithered, EF, fp32": _encode(4, "fp32", **_ROTATED),
    "encode 4 bits, rotated, dithered, EF, tail": _encode(4, tail=100, **_ROTATED),
    "encode 1 bit, rotated, l1, EF": _encode(1, scale="l1", rotate=True, ef=True),
    "encode 4 bits, nearest, fp32": _encode(4, "fp32"),
    "encode 8 bits of 256, nearest, fp32": _encode(8, "fp32", block=256),
    "encode 4 bits of 64, dithered, EF": _encode(4, block=64, stochastic=True, ef=True),
    "encode 4 bits of 64, Gaussian, rotated, EF": _encode(4, block=64, **_GAUSSIAN, ef=True),
    "decode_mean of 8, 4 bits of 64, Gaussian, rotated": _decode(8, 4, block=64, **_GAUSSIAN),
    "decode_mean of 8, 4 bits, rotated": _decode(8, 4, rotate=True),
    "decode_mean of 8, 1 bit, rotated": _decode(8, 1, rotate=True),
    "decode_mean of 8, 4 bits of 256, fp32": _decode(8, 4, "fp32", block=256),
    "decode_mean of 8, 4 bits, weighted": _decode(8, 4, weighted=True),
    "decode_mean of 64, 4 bits, rotated": _decode(64, 4, rotate=True),
    "decode_mean of 2, 4 bits, bytes": _decode(2, 4, apart=1),
    "lloyd_encode of 256": _levels(ef=False),
    "lloyd_encode of 256, EF": _levels(ef=True),
    "lloyd_mean of 8": _mean_of_levels,
    "rotsign_encode 256 of 256": _signs(256, ef=False),
    "rotsign_encode 64 of 256, EF": _signs(64, ef=True),
    "rotsign_mean of 8": _mean_of_signs,
    "sign_words": _words,
    "topk_encode 64 of 4096, EF, fp32": _topk("fp32", ef=True),
    "topk_encode 64 of 4096, bf16": _topk("bf16", ef=False),
    "top_rows 1 of 64, EF": _rows(1),
    "top_rows 2 of 64, EF": _rows(2),
    "sparse_mean of 8, 64 of 4096": _sparse,
}


# -- peers: the nearest thing that others do -----------------------------------------------------


def _torch_encode(numel: int, device: torch.device) -> Timed:
    values = torch.randn(numel, device=device)
    packed, scales = encode_by_torch(values, bits=4)
    return lambda: encode_by_torch(values, bits=4), _bytes(values, packed, scales)


def _compiled_encode(numel: int, device: torch.device) -> Timed:
    values = torch.randn(numel, device=device)
    compiled = torch.compile(encode_by_torch)
    packed, scales = compiled(values, bits=4)
    return lambda: compiled(values, bits=4), _bytes(values, packed, scales)


def _torch_topk(numel: int, device: torch.device) -> Timed:
    rows = torch.randn(numel // CHUNK, CHUNK, device=device)
    return lambda: rows.abs().topk(64, sorted=False), _bytes(rows) + 12 * 64 * len(rows)


def _bitsandbytes_8bit(numel: int, device: torch.device) -> Timed:
    import bitsandbytes.functional as bnb

    values = torch.randn(numel, device=device)
    call = lambda: bnb.quantize_blockwise(values, blocksize=256)  # noqa: E731
    return call, numel * 5 + numel // 64


def _bitsandbytes_4bit(numel: int, device: torch.device) -> Timed:
    import bitsandbytes.functional as bnb

    values = torch.randn(numel, device=device, dtype=torch.bfloat16)
    call = lambda: bnb.quantize_4bit(values, blocksize=64, quant_type="nf4")  # noqa: E731
    return call, numel * 5 // 2 + numel // 16


def _torchao_8bit(numel: int, device: torch.device) -> Timed:
    from torchao.optim import quant_utils as ao

    values = torch.randn(numel, device=device)
    qmap = torch.tensor(ao.create_dynamic_map(signed=True), device=device)

    def quantise(x: Tensor) -> Any:
        scaled, scale = ao.scale_tensor(x, 256)
        return ao.quantize_8bit_with_qmap(scaled, qmap), scale

    compiled = torch.compile(quantise)
    return lambda: compiled(values), numel * 5 + numel // 64


def _torchft_fp8(numel: int, device: torch.device) -> Timed:
    from torchft.quantization import fused_quantize_into_fp8

    values = [torch.randn(numel // CHUNK, CHUNK, device=device, dtype=torch.bfloat16)]
    return lambda: fused_quantize_into_fp8(values, 8), numel * 3 + numel // 1024


#: Each raises ``ImportError`` where its package is not installed.
PEERS: Mapping[str, Make] = {
    "torch: encode 4 bits, nearest, fp32 (reference)": _torch_encode,
    "torch, compiled: encode 4 bits, nearest, fp32 (reference)": _compiled_encode,
    "torch: topk 64 of 4096, fp32": _torch_topk,
    "bitsandbytes: 8 bits of 256, fp32": _bitsandbytes_8bit,
    "bitsandbytes: nf4 of 64, bf16": _bitsandbytes_4bit,
    "torchao: 8 bits of 256, fp32, compiled": _torchao_8bit,
    "torchft: fp8 rows of 4096, bf16": _torchft_fp8,
}
