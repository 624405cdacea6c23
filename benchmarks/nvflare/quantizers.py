"""NVFLARE's own quantisers, on machines with and without a GPU.

Its filters move each tensor to a GPU for 8 and 4 bits. Without one, bitsandbytes has the same
quantisers for CPUs; here tensors then stay where they are. The bytes are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nvflare.app_opt.pt.quantization.dequantizer import ModelDequantizer
from nvflare.app_opt.pt.quantization.quantizer import ModelQuantizer
from torch import Tensor


@contextmanager
def _without_gpu() -> Iterator[None]:
    """``Tensor.cuda()`` returns the tensor itself where there is no GPU."""
    moves = Tensor.cuda
    if not torch.cuda.is_available():
        Tensor.cuda = lambda self, *args, **options: self
    try:
        yield
    finally:
        Tensor.cuda = moves


class Quantize(ModelQuantizer):  # type: ignore[misc]
    """``ModelQuantizer``."""

    def __init__(self, quantization_type: str) -> None:
        super().__init__(quantization_type)

    def process_dxo(self, *args: Any) -> Any:
        """The quantised DXO."""
        with _without_gpu():
            return super().process_dxo(*args)


class Dequantize(ModelDequantizer):  # type: ignore[misc]
    """``ModelDequantizer``."""

    def process_dxo(self, *args: Any) -> Any:
        """The plain DXO."""
        with _without_gpu():
            return super().process_dxo(*args)


def quantize(recipe: Any, kind: str) -> None:
    """Add them for both directions, as NVFLARE's guide does."""
    recipe.add_client_output_filter(Quantize(kind), tasks=["train"])
    recipe.add_server_input_filter(Dequantize(), tasks=["train"])
    recipe.add_server_output_filter(Quantize(kind), tasks=["train"])
    recipe.add_client_input_filter(Dequantize(), tasks=["train"])
