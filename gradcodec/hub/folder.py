"""What a codec folder holds, the names of its files, and the prefixes of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from gradcodec.errors import HubError
from gradcodec.types import UpdateSpec

CONFIG_NAME: Final = "config.json"
WEIGHTS_NAME: Final = "model.safetensors"
CARD_NAME: Final = "README.md"

#: Prefixes of the weight names of each half.
HALVES: Final = {"encoder": ("encoder.", "shared."), "decoder": ("decoder.", "shared.")}
PREFIXES: Final = ("encoder.", "decoder.", "shared.")


@dataclass(frozen=True, eq=False)
class Folder:
    """Everything a codec folder holds.

    Attributes:
        config: the codec's ``to_dict()``, ``"kind"`` included.
        spec: the tensor table that the codec is bound to; ``None`` if it is not bound.
        weights: tensors by name; only those of one half if only that half was read.
        digests: hex SHA-256 by weight name, always of both halves.
        digest: the 8 bytes that payloads pin.
        notes: what the codec was fitted on, in the words of its author.
    """

    config: dict[str, Any]
    spec: UpdateSpec | None
    weights: dict[str, Tensor]
    digests: dict[str, str]
    digest: bytes
    notes: str | None = None

    @property
    def kind(self) -> str:
        """The codec family."""
        return str(self.config["kind"])

    def check_digest(self, actual: bytes) -> None:
        """Raise ``HubError`` unless ``actual`` is the digest the codec was saved with."""
        if actual != self.digest:
            raise HubError(
                f"expected a {self.kind} codec of digest {self.digest.hex()}, its config, tensor "
                f"table and weights give {actual.hex()}: the folder was altered"
            )
