"""Base class of transforms: named tensors <-> one code vector, and the derivative of ``from_code``.

    update --to_code--> z [m] --from_code--> update~

A transform is bound to a tensor table and holds the learned weights. It knows nothing of bytes: a
packer behind it turns the code into a body.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.types import Update, UpdateSpec


class Transform(ABC):
    """Analysis ``to_code`` and synthesis ``from_code`` of the updates of one tensor table.

    Args:
        spec: the tensor table, if it is known; otherwise ``to_code`` and ``from_code`` need it as
            an argument.
        weights: learned tensors by name.
    """

    kind: ClassVar[str]
    """The family, as error messages name it."""
    linear: ClassVar[bool] = True
    """Whether codes add: ``from_code(a) + from_code(b) == from_code(a + b)``."""

    def __init__(
        self, spec: UpdateSpec | None = None, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        self.spec = spec
        self.weights: dict[str, Tensor] = dict(weights or {})

    @abstractmethod
    def code_numel(self, spec: UpdateSpec | None = None) -> int:
        """The number ``m`` of code values."""

    @abstractmethod
    def to_code(self, update: Update, spec: UpdateSpec | None = None) -> Tensor:
        """The code ``z`` ``[m]`` of an update, fp32.

        The caller has checked the update against the table. A NaN or Inf in the update either
        reaches the code or is refused here, so checking the code is enough to find it.

        Raises:
            NonFiniteError: the update holds NaN or Inf in a place that the code does not show.
        """

    @abstractmethod
    def from_code(self, z: Tensor, spec: UpdateSpec | None = None) -> dict[str, Tensor]:
        """The update of a code ``[m]``: the table's names, shapes and dtypes.

        Differentiable in ``z``.

        Raises:
            UpdateError: ``spec`` differs from the bound table.
        """

    def pullback(self, z: Tensor, gradients: Update) -> Tensor:
        """The vector-Jacobian product of ``from_code`` at ``z``.

        Args:
            z: the code ``[m]``.
            gradients: the loss's gradient with respect to each tensor of ``from_code(z)``; tensors
                that are left out count as zero.

        Returns:
            The loss's gradient with respect to ``z``, ``[m]``.
        """
        leaf = z.detach().requires_grad_()
        with torch.enable_grad():
            out = self.from_code(leaf)
        names = [n for n in out if n in gradients]
        seeds = [gradients[n].to(out[n].dtype) for n in names]
        pulled: Tensor = torch.autograd.grad([out[n] for n in names], leaf, seeds)[0]
        return pulled

    def step_scales(self) -> Tensor:
        """``[m]``: how far to move each code value for a step of unit size per parameter value.

        An adaptive optimiser moves every value by about its learning rate ``lr``. That is a step of
        norm ``lr sqrt(n)`` in parameter space, and ``lr ||J s||`` through the Jacobian ``J`` of
        ``from_code`` with scales ``s``. The default is one scale for all values,
        ``sqrt(n) / ||J e||`` for a fixed random sign vector ``e``, taken at ``z = 0``.
        """
        spec = self.table()
        m = self.code_numel()
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (m,), generator=generator).float() * 2 - 1

        def decode(z: Tensor) -> Tensor:
            return layout.flatten_any(self.from_code(z), spec)

        # What a transform caches on its first call must not be made inside jvp: such tensors can be
        # neither copied nor pickled afterwards.
        decode(torch.zeros(m))
        moved = torch.func.jvp(decode, (torch.zeros(m),), (signs,))[1]
        norm = float(moved.norm())
        return torch.full((m,), math.sqrt(spec.numel) / norm if norm else 1.0)

    def table(self, spec: UpdateSpec | None = None) -> UpdateSpec:
        """The tensor table to work on: the bound one, or ``spec`` where none is bound.

        Raises:
            ConfigError: there is neither.
            UpdateError: ``spec`` differs from the bound table.
        """
        if self.spec is None:
            if spec is None:
                raise ConfigError("the codec is not bound to a tensor table; call .bind(spec)")
            return spec
        if spec is not None and spec != self.spec:
            raise UpdateError(f"{self.kind}: bound to another tensor table")
        return self.spec
