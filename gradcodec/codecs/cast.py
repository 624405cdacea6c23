"""Half-precision controls: the cheapest compression there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gradcodec.codecs.base import register
from gradcodec.codecs.identity import Identity, IdentityConfig
from gradcodec.codecs.settings import check_one_of

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class CastConfig(IdentityConfig):
    """``dtype``: ``"float16"`` or ``"bfloat16"``."""

    kind: ClassVar[str] = "cast"
    dtype: str = "float16"

    def __post_init__(self) -> None:
        check_one_of(self.kind, "dtype", self.dtype, tuple(_DTYPES))


@register
class Cast(Identity):
    """Floating tensors wider than 16 bits are rounded to nearest even in fp16 or bf16.

        update --round--> 16-bit values --> body

    Other dtypes travel unchanged. NaN and Inf pass; finite values beyond fp16's range become Inf,
    as in ``torch.distributed``'s ``fp16_compress_hook``.
    """

    Config = CastConfig
    config: CastConfig

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """16 bits for wider floating dtypes, else ``dtype`` itself."""
        return _DTYPES[self.config.dtype] if dtype in (torch.float32, torch.float64) else dtype
