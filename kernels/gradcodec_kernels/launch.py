"""How kernels are launched: grids, settings by architecture, views of payloads."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

CHUNK = 4096
"""Values of a program."""

MAGIC = 0x4A800000
"""The bits of 2**22 in fp32, passed to kernels as an argument; see ``unpack.level``."""

Rotation = tuple[Tensor, Tensor]
"""``LEFT = H D_r / 8`` and ``RIGHT = D_c H / 8``, bf16 ``[64, 64]``; kernels transpose them."""

#: Warps of a program by op, architecture (``80``, ``"gfx942"``), dtype of the values and bits;
#: ``None`` matches all, and the most specific entry wins. Chosen with
#: ``benchmarks/kernels/aot_gate.py``. There is no autotuning: it could choose differently on every
#: rank, and costs seconds on each.
WARPS: Mapping[tuple[str, int | str | None, torch.dtype | None, int | None], int] = (
    MappingProxyType(
        {
            ("encode", None, None, None): 4,
            ("decode_mean", None, None, None): 4,
            ("lloyd_encode", None, None, None): 8,
            ("lloyd_mean", None, None, None): 4,
            ("rotsign_encode", None, None, None): 8,
            ("rotsign_mean", None, None, None): 8,
            ("sign_words", None, None, None): 1,
            ("topk_encode", None, None, None): 8,
            ("top_rows", None, None, None): 4,
            ("sparse_mean", None, None, None): 4,
            # Warps have 64 lanes here: with 4 there would be more lanes than words of 1-bit codes.
            ("encode", "gfx942", None, None): 2,
            ("decode_mean", "gfx942", None, None): 2,
        }
    )
)


def warps(op: str, arch: int | str | None, dtype: torch.dtype, bits: int | None) -> int:
    """The most specific entry of ``WARPS``."""
    for key in (
        (op, arch, dtype, bits),
        (op, arch, dtype, None),
        (op, arch, None, bits),
        (op, arch, None, None),
        (op, None, dtype, bits),
        (op, None, dtype, None),
        (op, None, None, bits),
    ):
        if key in WARPS:
            return WARPS[key]
    return WARPS[op, None, None, None]


@functools.cache
def architecture(device: torch.device) -> int | str | None:
    """``90`` for compute capability 9.0, or ``"gfx942"``; ``None`` on the CPU (interpreter)."""
    if device.type != "cuda":
        return None
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(device).gcnArchName
        return name.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def options(op: str, values: Tensor, bits: int | None = None) -> dict[str, int | bool]:
    """Settings of a launch, without fusion of multiplies and adds, which would change bits."""
    arch = architecture(values.device)
    return {"num_warps": warps(op, arch, values.dtype, bits), "enable_fp_fusion": False}


def launches(numel: int, chunk: int = CHUNK) -> Iterator[tuple[tuple[int], int, int, bool]]:
    """Grid, first chunk, values in the last chunk, and whether all chunks are whole.

    The tail is a separate launch, so that whole chunks need no masks.
    """
    whole, rest = divmod(numel, chunk)
    if whole:
        yield (whole,), 0, chunk, True
    if rest:
        yield (1,), whole, rest, False


def halves(seed: int) -> tuple[int, int]:
    """Low and high 32 bits as signed integers, so that arguments have one type for all seeds."""
    low, high = ((seed >> shift) & 0xFFFFFFFF for shift in (0, 32))
    return low - ((low >> 31) << 32), high - ((high >> 31) << 32)


def check_block(block: int) -> None:
    """Raise ``ValueError`` for a block that no kernel takes."""
    if not 64 <= block <= CHUNK or block & (block - 1):
        raise ValueError(f"expected a block of a power of two, 64..{CHUNK}, got {block}")


def check_kept(kept: int) -> None:
    """Raise ``ValueError`` if the kept signs of a block do not fill whole bytes."""
    if kept % 8:
        raise ValueError(f"expected a multiple of 8 signs of a block, got {kept}")


def payload(packed: Tensor, whole: bool) -> Tensor:
    """View ``[W, bytes]`` as int32 words if only whole chunks are read and rows are aligned."""
    if whole and packed.stride(0) % 4 == 0 and packed.data_ptr() % 4 == 0:
        return packed[:, : packed.shape[1] // 4 * 4].view(torch.int32)
    return packed
