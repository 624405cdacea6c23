"""Limits for codecs that somebody else made: their weights, and how much their bodies decode to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from gradcodec import layout
from gradcodec.encodable import check_name, check_tensor, shown
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.types import UpdateSpec

#: The most decoded bytes per byte of a body, for codecs from a folder or the Hub. The sparsest
#: untrained codec, with one bit for one of 65,536 fp64 values, comes to 2^17.75.
MAX_EXPANSION: Final = 1 << 18
#: Decoded bytes that are always allowed, however small the body is.
MAX_UNPAID: Final = 1 << 26


def check_weights(kind: str, weights: Mapping[str, Tensor], learned: bool) -> None:
    """Raise ``ConfigError`` unless these are plain finite tensors, and none if not ``learned``."""
    if weights and not learned:
        names = ", ".join(map(shown, list(weights)[:3]))
        raise ConfigError(f"{kind}: has no weights, got {names}")
    for name, tensor in weights.items():
        try:
            check_name(name)
            check_tensor(name, tensor)
            layout.check_finite(tensor, f"weight {shown(name)}")
        except UpdateError as err:
            raise ConfigError(f"{kind}: {err}") from err


def check_claim(kind: str, spec: UpdateSpec, body: int) -> None:
    """Raise ``ConfigError`` if ``body`` bytes would decode to more than ``MAX_EXPANSION`` allows.

    The tensor table of a codec folder is only a claim: a tensor without a code takes no bytes of
    the body, so the zeros it decodes to would be allocated on the word of whoever made the folder.
    """
    if spec.nbytes > max(MAX_UNPAID, MAX_EXPANSION * body):
        raise ConfigError(
            f"{kind}: a body of {body} bytes would decode to {spec.nbytes}; expected at most "
            f"{MAX_EXPANSION} times as many, or {MAX_UNPAID}; leave tensors that have no code out "
            "of the table"
        )
