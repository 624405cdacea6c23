"""The transform that changes nothing: the code is the values."""

from __future__ import annotations

from torch import Tensor

from gradcodec import layout
from gradcodec.transforms.transform import Transform
from gradcodec.types import Update, UpdateSpec


class IdentityTransform(Transform):
    """All values as one vector, tensors in table order, each row-major.

    update --flatten--> z --unflatten--> update
    """

    kind = "identity"

    def code_numel(self, spec: UpdateSpec | None = None) -> int:
        """The number of values."""
        return self.table(spec).numel

    def to_code(self, update: Update, spec: UpdateSpec | None = None) -> Tensor:
        """The values in fp32.

        Raises:
            UpdateError: a tensor is not of a floating dtype.
        """
        return layout.flatten(update, self.table(spec))

    def from_code(self, z: Tensor, spec: UpdateSpec | None = None) -> dict[str, Tensor]:
        """The values in the tensors' shapes and dtypes."""
        return layout.unflatten(z, self.table(spec))
