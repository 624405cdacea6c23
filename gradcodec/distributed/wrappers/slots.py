"""The parameters of a bucket: whose gradient lies where in its buffer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gradcodec.errors import ConfigError


@dataclass
class Slot:
    """A parameter's gradient in a bucket: its values in memory order and its view."""

    name: str
    flat: Tensor
    view: Tensor


class Named:
    """Finds names by parameters, which is what DDP knows them by.

    Args:
        parameters: of the model, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._names = {id(p): n for n, p in parameters.items()}
        self._parameters = list(parameters.values())  # an id is only good while its object lives

    def names(self, bucket: Any) -> tuple[str, ...]:
        """Of all parameters in a ``GradBucket``.

        Raises:
            ConfigError: one of them is not of the model.
        """
        found = []
        for parameter in bucket.parameters():
            name = self._names.get(id(parameter))
            if name is None:
                raise ConfigError(
                    f"a parameter of shape {tuple(parameter.shape)} is not one that this state was "
                    "made for; make it from the model that is trained, after changing the model"
                )
            found.append(name)
        return tuple(found)

    def slots(self, bucket: Any) -> list[Slot]:
        """Where their gradients are in a dense bucket, as real numbers."""
        buffer, slots = bucket.buffer(), []
        base, parameters = buffer.storage_offset(), bucket.parameters()
        for name, parameter, view in zip(
            self.names(bucket), parameters, bucket.gradients(), strict=True
        ):
            # DDP lays complex gradients out as pairs of real numbers, and still counts pairs.
            width = 2 if parameter.is_complex() else 1
            at, numel = width * (view.storage_offset() - base), width * view.numel()
            flat = buffer[at : at + numel]
            slots.append(Slot(name, flat, view if width == 1 else flat.view(*view.shape, 2)))
        if sum(s.flat.numel() for s in slots) != buffer.numel():
            raise ConfigError(f"expected a bucket of its parameters, got {buffer.numel()} elements")
        return slots
