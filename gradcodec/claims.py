"""What a codec that somebody else made may bring along and claim: weights, and sizes of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from gradcodec import layout
from gradcodec.encodable import check_name, check_tensor, shown
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.types import UpdateSpec

#: Bytes that a body of a codec out of a folder may decode to, for each byte of its own. The
#: sparsest untrained codec, one bit for one of 65,536 fp64 values, comes to 2^17.75.
MAX_EXPANSION: Final = 1 << 18
#: Bytes that it may decode to whatever its own size.
MAX_UNPAID: Final = 1 << 26


def check_weights(kind: str, weights: Mapping[str, Tensor], learned: bool) -> None:
    """Raise ``ConfigError`` unless these are plain finite tensors, and none if none is learned."""
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

    What a codec folder's table says of sizes is a claim: tensors without a code are not in the
    body, and the zeros that they decode to would be allocated on the word of the folder.
    """
    if spec.nbytes > max(MAX_UNPAID, MAX_EXPANSION * body):
        raise ConfigError(
            f"{kind}: a body of {body} bytes would decode to {spec.nbytes}; expected at most "
            f"{MAX_EXPANSION} times as many, or {MAX_UNPAID}; leave tensors that have no code out "
            "of the table"
        )
