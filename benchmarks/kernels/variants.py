"""What the gate compiles: every kernel as it is launched for one use, and for which GPUs.

The names are those of ``calls.KERNELS``, which runs the same uses on a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triton.compiler import ASTSource

from gradcodec_kernels import launch, topk_encode
from gradcodec_kernels.decode_mean import decode_mean_kernel
from gradcodec_kernels.encode import encode_kernel
from gradcodec_kernels.lloyd_encode import lloyd_encode_kernel
from gradcodec_kernels.lloyd_mean import lloyd_mean_kernel
from gradcodec_kernels.rotsign_encode import rotsign_encode_kernel
from gradcodec_kernels.rotsign_mean import rotsign_mean_kernel
from gradcodec_kernels.sign_words import WORDS, sign_words_kernel
from gradcodec_kernels.sparse_mean import sparse_mean_kernel
from gradcodec_kernels.top_rows import top_rows_kernel

_SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}
_BF16 = {"LEFT": "bf16", "RIGHT": "bf16", "S": "bf16", "SCALES": "bf16"}


@dataclass(frozen=True)
class Variant:
    """A kernel as it is launched for one use.

    Attributes:
        op: its name in ``launch.WARPS``.
        kernel: the jitted function.
        pointers: element type of each pointer argument.
        constants: its ``constexpr`` arguments.
        moved: bytes per element that must be read or written.
        dtype: of the values, for the settings of the launch.
        bits: of the codes, likewise.
        elements: of a program.
        straight: no loop, so that instructions in the binary are instructions executed.
    """

    op: str
    kernel: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any]
    moved: float
    dtype: str = "fp32"
    bits: int | None = None
    elements: int = launch.CHUNK
    straight: bool = True

    def source(self) -> ASTSource:
        """Arguments as the launcher gives them: aligned pointers, strides that divide by 16."""
        signature, attributes = {}, {}
        for i, p in enumerate(self.kernel.params):
            if p.name in self.constants:
                signature[p.name] = "constexpr"
                continue
            pointer = self.pointers.get(p.name)
            scalar = "fp32" if p.name in ("before", "after") else "i32"
            signature[p.name] = f"*{pointer}" if pointer else scalar
            if pointer or not (p.do_not_specialize or scalar == "fp32"):
                attributes[(i,)] = [["tt.divisibility", 16]]
        return ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs=dict(self.constants),
            attrs=attributes,
        )


def _encode(
    bits: int,
    dtype: str = "bf16",
    *,
    block: int = 4096,
    scale: str = "absmax",
    rotate: bool = False,
    stochastic: bool = False,
    ef: bool = False,
    even: bool = True,
    gaussian: bool = False,
) -> Variant:
    constants = {
        "BITS": bits,
        "BLOCK": block,
        "SCALE": scale,
        "GAUSSIAN": gaussian,
        "ROTATE": rotate,
        "STOCHASTIC": stochastic,
        "EF": ef,
        "EVEN": even,
    }
    moved = _SIZES[dtype] * (3 if ef else 1) + bits / 8 + 2 / block
    pointers = {"X": dtype, "E": dtype, "P": "u8", **_BF16}
    return Variant("encode", encode_kernel, pointers, constants, moved, dtype, bits)


def _decode(
    world: int,
    bits: int,
    out: str = "bf16",
    *,
    block: int = 4096,
    rotate: bool = False,
    weighted: bool = False,
    words: str = "i32",
    gaussian: bool = False,
) -> Variant:
    constants = {
        "W": world,
        "BITS": bits,
        "GAUSSIAN": gaussian,
        "BLOCK": block,
        "ROTATE": rotate,
        "WEIGHTED": weighted,
        "EVEN": True,
    }
    pointers = {"P": words, "WEIGHTS": "fp32" if weighted else "bf16", "OUT": out, **_BF16}
    moved = world * (bits / 8 + 2 / block) + _SIZES[out]
    kernel, straight = decode_mean_kernel, world <= 16
    return Variant("decode_mean", kernel, pointers, constants, moved, out, bits, straight=straight)


def _levels(*, ef: bool) -> Variant:
    constants = {"BLOCK": 256, "EF": ef, "EVEN": True}
    moved = 4 * (3 if ef else 1) + 2 / 8 + 4 / 256
    pointers = {"X": "fp32", "E": "fp32", "P": "u8", "S": "bf16"}
    return Variant("lloyd_encode", lloyd_encode_kernel, pointers, constants, moved, bits=2)


def _mean_of_levels(world: int) -> Variant:
    constants = {"BLOCK": 256, "WEIGHTED": False, "EVEN": True}
    moved = world * (2 / 8 + 4 / 256) + 4
    pointers = {"P": "u8", "S": "bf16", "WEIGHTS": "bf16", "OUT": "fp32"}
    kernel = lloyd_mean_kernel
    return Variant("lloyd_mean", kernel, pointers, constants, moved, bits=2, straight=False)


def _signs(kept: int, *, ef: bool) -> Variant:
    constants = {"BLOCK": 256, "KEPT": kept, "EF": ef, "EVEN": True}
    moved = 4 * (3 if ef else 1) + (1 + kept / 256) / 8 + 2 / 256
    pointers = {"X": "fp32", "E": "fp32", "D": "u8", "P": "u8", "S": "bf16"}
    return Variant("rotsign_encode", rotsign_encode_kernel, pointers, constants, moved, bits=1)


def _mean_of_signs(world: int) -> Variant:
    constants = {"BLOCK": 256, "KEPT": 256, "WEIGHTED": False, "EVEN": True}
    moved = world * (2 / 8 + 2 / 256) + 4
    pointers = {"P": "u8", "S": "bf16", "D": "u8", "WEIGHTS": "bf16", "OUT": "fp32"}
    kernel = rotsign_mean_kernel
    return Variant("rotsign_mean", kernel, pointers, constants, moved, bits=1, straight=False)


def _topk(dtype: str, nbits: int, *, ef: bool) -> Variant:
    constants = {"K": 64, "CHUNK": 4096, "TILE": 4096, "NBITS": nbits, "EF": ef, "EVEN": True}
    pointers = {"X": dtype, "E": dtype, "KEPT": dtype, "INDEX": "i16"}
    moved = _SIZES[dtype] * (3 if ef else 1) + (2 + _SIZES[dtype]) / 64
    return Variant(
        "topk_encode", topk_encode.topk_encode_kernel, pointers, constants, moved, dtype, 4096
    )


def _rows(k: int) -> Variant:
    pointers = {"X": "bf16", "E": "bf16", "KEPT": "bf16", "INDEX": "u8"}
    constants = {"K": k, "EF": True, "EVEN": True}
    return Variant("top_rows", top_rows_kernel, pointers, constants, 6 + 3 * k / 64, "bf16")


def _words() -> Variant:
    pointers = {"TABLE": "i64", "OUT": "i64"}
    # 2**22 words, the signs of 2**28 values.
    constants = {"BITS": 22, "LANE_BITS": WORDS.bit_length() - 1}
    return Variant(
        "sign_words",
        sign_words_kernel,
        pointers,
        constants,
        8,
        elements=WORDS,
        straight=False,
    )


_ROTATED: dict[str, Any] = {"rotate": True, "stochastic": True, "ef": True}
_GAUSSIAN: dict[str, Any] = {"rotate": True, "gaussian": True}

VARIANTS: Mapping[str, Variant] = {
    "encode 4 bits, rotated, dithered, EF, bf16": _encode(4, **_ROTATED),
    "encode 4 bits, rotated, dithered, EF, fp32": _encode(4, "fp32", **_ROTATED),
    "encode 4 bits, rotated, dithered, EF, tail": _encode(4, even=False, **_ROTATED),
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
    "decode_mean of 2, 4 bits, bytes": _decode(2, 4, words="u8"),
    "lloyd_encode of 256": _levels(ef=False),
    "lloyd_encode of 256, EF": _levels(ef=True),
    "lloyd_mean of 8": _mean_of_levels(8),
    "rotsign_encode 256 of 256": _signs(256, ef=False),
    "rotsign_encode 64 of 256, EF": _signs(64, ef=True),
    "rotsign_mean of 8": _mean_of_signs(8),
    "sign_words": _words(),
    "topk_encode 64 of 4096, EF, fp32": _topk("fp32", 31, ef=True),
    "topk_encode 64 of 4096, bf16": _topk("bf16", 15, ef=False),
    "top_rows 1 of 64, EF": _rows(1),
    "top_rows 2 of 64, EF": _rows(2),
    "sparse_mean of 8, 64 of 4096": Variant(
        "sparse_mean",
        sparse_mean_kernel,
        {"KEPT": "bf16", "INDEX": "i16", "OUT": "fp32"},
        {"W": 8, "K": 64, "LIST": 64, "CHUNK": 4096, "TILE": 4096},
        4 + 8 * 4 / 64,
        "bf16",
    ),
}

#: Compiled for every target, each kernel at least once; the others for ``sm_90`` alone, for time.
EVERYWHERE = frozenset(
    {
        "encode 4 bits, rotated, dithered, EF, bf16",
        "encode 4 bits, rotated, dithered, EF, fp32",
        "encode 1 bit, rotated, l1, EF",
        "encode 4 bits of 64, dithered, EF",
        "encode 4 bits of 64, Gaussian, rotated, EF",
        "decode_mean of 8, 4 bits of 64, Gaussian, rotated",
        "decode_mean of 8, 4 bits, rotated",
        "decode_mean of 8, 1 bit, rotated",
        "lloyd_encode of 256, EF",
        "lloyd_mean of 8",
        "rotsign_encode 64 of 256, EF",
        "rotsign_mean of 8",
        "sign_words",
        "topk_encode 64 of 4096, EF, fp32",
        "top_rows 2 of 64, EF",
        "sparse_mean of 8, 64 of 4096",
    }
)


def variants(target: str) -> list[str]:
    """Names of what is compiled for a target."""
    return [name for name in VARIANTS if target == "sm_90" or name in EVERYWHERE]
