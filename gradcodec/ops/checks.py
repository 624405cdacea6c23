"""Checks that the declarations of ops share; all raise ``ConfigError``."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.reference.bitpack import packed_nbytes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check_vector(what: str, tensor: Tensor) -> None:
    """One dimension of fp32, bf16 or fp16."""
    if tensor.dim() != 1 or tensor.dtype not in FLOATS:
        raise ConfigError(
            f"{what}: expected one dimension of float32, bfloat16 or float16, got {tensor.dtype} "
            f"{list(tensor.shape)}"
        )


def check_residual(residual: Tensor | None, numel: int, like: Tensor) -> None:
    """``numel`` contiguous values on the device of ``like``, which an op may write."""
    if residual is None:
        return
    check_vector("residual", residual)
    fits = residual.numel() == numel and residual.is_contiguous()
    if not fits or residual.device != like.device:
        raise ConfigError(
            f"residual: expected {numel} contiguous values on {like.device}, got "
            f"{residual.numel()} on {residual.device}"
        )


def check_shape(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Exactly this shape and dtype."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ConfigError(
            f"{what}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )


def check_payloads(
    packed: Tensor, scales: Tensor, bits: int, blocks: int, weights: Tensor | None
) -> None:
    """Rows of ``bits`` packed bits with ``blocks`` scales, and a weight for each row or none."""
    if packed.dim() != 2 or not len(packed):
        raise ConfigError(f"packed: expected [W, bytes] with W >= 1, got {list(packed.shape)}")
    world = len(packed)
    check_shape("packed", packed, (world, packed_nbytes(bits, 1)), torch.uint8)
    check_shape("scales", scales, (world, blocks), torch.bfloat16)
    if weights is not None:
        check_shape("weights", weights, (world,), torch.float32)


def check_numel(numel: int) -> None:
    """A number of values, not negative; called before memory of that size is allocated."""
    if numel < 0:
        raise ConfigError(f"expected a number of values, got {numel}")
