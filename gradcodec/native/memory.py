"""Tensors as C sees them, and the checks that keep C from reading or writing elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from gradcodec.errors import ConfigError

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def at(what: str, tensor: Tensor | None, numel: int, *dtypes: torch.dtype) -> int | None:
    """Address of a tensor of ``numel`` values; ``None``, a null pointer, if there is none."""
    if tensor is None:
        return None
    if (
        tensor.numel() != numel
        or tensor.dtype not in dtypes
        or not tensor.is_contiguous()
        or tensor.device.type != "cpu"
    ):
        raise ConfigError(
            f"{what}: expected {numel} contiguous values of {dtypes} on the CPU, got "
            f"{tensor.numel()} of {tensor.dtype} on {tensor.device}, strides {tensor.stride()}"
        )
    return tensor.data_ptr()


def typed(what: str, tensor: Tensor | None, numel: int) -> tuple[int | None, int]:
    """Address of a floating tensor, and the number by which C knows its dtype."""
    if tensor is None:
        return None, 0
    return at(what, tensor, numel, *_DTYPES), _DTYPES[tensor.dtype]
