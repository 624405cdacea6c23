"""Codecs, tensors and bases as the texts that ranks compare.

Equal texts mean equal messages and equal results. Settings that concern one rank only, such as how
often it logs or measures, are not part of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.distributed.coding import codec_name, named_codec
from gradcodec.distributed.lowrank import LowRank
from gradcodec.wire import tensor_digest


def choice_text(choice: Codec | LowRank | str) -> str:
    """A codec's name, else its settings and digest (weights included); low rank's settings."""
    if choice == "lowrank":
        choice = LowRank()
    if isinstance(choice, LowRank):
        return repr(choice)
    codec = named_codec(choice)
    return codec_name(codec) or f"{codec!r} of digest {codec.digest.hex()}"


def rules_text(rules: Iterable[tuple[str, Codec | LowRank | str]]) -> str:
    """The patterns with the codecs they choose, in order."""
    return ", ".join(f"{pattern!r}: {choice_text(choice)}" for pattern, choice in rules)


def tensor_text(tensor: Tensor) -> str:
    """Dtype, shape and layout."""
    layout = "" if tensor.layout is torch.strided else f" {tensor.layout}"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}{layout}"


def values_text(tensor: Tensor | None) -> str:
    """Dtype, shape and a digest of the values."""
    if tensor is None:
        return "none"
    return f"{tensor_text(tensor)} of digest {tensor_digest(tensor.detach().cpu())[:16]}"
