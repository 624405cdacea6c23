"""Half precision: the cheapest compression there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradcodec.packers.raw import IdentityConfig, RawPacker
from gradcodec.settings import check_one_of

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class CastConfig(IdentityConfig):
    """``dtype``: ``"float16"`` or ``"bfloat16"``."""

    kind: ClassVar[str] = "cast"
    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_one_of(self.kind, "dtype", self.dtype, tuple(_DTYPES))


class CastPacker(RawPacker):
    """Values are rounded to nearest even in fp16 or bf16.

        x --round--> 16-bit values --> body

    NaN and Inf pass; finite values beyond fp16's range become Inf, as in ``torch.distributed``'s
    ``fp16_compress_hook``.
    """

    kind = "cast"

    def __init__(self, config: CastConfig) -> None:
        self.config = config

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """16 bits for fp32 and fp64, else ``dtype`` itself."""
        return _DTYPES[self.config.dtype] if dtype in (torch.float32, torch.float64) else dtype
