"""The parameters that all ranks have in common between exchanges, and the outer step on them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcodec.distributed.checks import is_dtensor
from gradcodec.errors import ConfigError


@dataclass(frozen=True)
class OuterSGD:
    """SGD on anchors: DiLoCo's outer optimiser (arXiv 2311.08105).

    ``b <- momentum b + g``, then ``a <- a - lr (g + momentum b)``, or ``a <- a - lr b`` without
    ``nesterov``. With momentum 0 and rate 1 the new anchor is the mean of the ranks' parameters
    (local SGD, FedAvg). SparseLoCo has momentum 0: its error feedback takes that part.

    Attributes:
        lr: rate, over 0.
        momentum: 0 or more, under 1.
        nesterov: as ``torch.optim.SGD``; without momentum it changes nothing.

    Raises:
        ConfigError: a value is out of range.
    """

    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.lr, float | int) and math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"expected an outer lr over 0, got {self.lr!r}")
        if not (isinstance(self.momentum, float | int) and 0 <= self.momentum < 1):
            raise ConfigError(
                f"expected an outer momentum from 0 to under 1, got {self.momentum!r}"
            )


class Anchors:
    """Anchor and outer momentum of every parameter, in fp32 (fp64 for fp64 parameters).

    Args:
        parameters: of the model, by name; of a ``DTensor`` the part that this rank holds.
        outer: settings of the outer step.
        offload: keep both in host memory; else they are where the parameters are.
    """

    def __init__(self, parameters: Mapping[str, Tensor], outer: OuterSGD, offload: bool) -> None:
        self.outer, self._parameters = outer, dict(parameters)
        self.values: dict[str, Tensor] = {}
        self.momenta: dict[str, Tensor] = {}
        for name in self._parameters:
            local = self.local(name)
            wide = torch.float64 if local.dtype is torch.float64 else torch.float32
            device = torch.device("cpu") if offload else local.device
            self.values[name] = local.to(device, wide, copy=True).contiguous()
            if outer.momentum:
                self.momenta[name] = torch.zeros_like(self.values[name])

    def local(self, name: str) -> Tensor:
        """What this rank holds of a parameter, on its memory."""
        return local_part(self._parameters[name])

    def pseudo_gradient(self, name: str) -> Tensor:
        """Anchor minus parameter, in the anchor's dtype on the parameter's device.

        The anchor is first rounded to the parameter's dtype, from which training went on: else
        what that rounding took away would count as trained.
        """
        local = self.local(name)
        wide = self.values[name].dtype
        anchor = self.values[name].to(local.device)
        return (anchor.to(local.dtype).to(wide) - local.to(wide)).contiguous()

    def advance(self, name: str, mean: Tensor) -> None:
        """The outer step of one anchor, along the mean pseudo-gradient."""
        anchor, o = self.values[name], self.outer
        direction = mean.to(anchor.device)
        if o.momentum:
            momentum = self.momenta[name].mul_(o.momentum).add_(direction)
            direction = direction + o.momentum * momentum if o.nesterov else momentum
        anchor.sub_(o.lr * direction)

    def merge(self, name: str, mixing: float) -> None:
        """``parameter <- mixing parameter + (1 - mixing) anchor``."""
        local = self.local(name)
        anchor = self.values[name].to(local.device)
        if mixing:
            anchor = torch.lerp(anchor, local.to(anchor.dtype), mixing)
        local.copy_(anchor)

    def tensors(self) -> dict[str, Tensor]:
        """``anchor.NAME`` and ``momentum.NAME``, the tensors themselves."""
        out = {f"anchor.{n}": t for n, t in self.values.items()}
        return out | {f"momentum.{n}": t for n, t in self.momenta.items()}

    def load(self, found: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` gave, by its keys.

        An anchor that is not there starts where its parameter is, a momentum at zero.
        """
        for key, tensor in self.tensors().items():
            kind, _, name = key.partition(".")
            if key in found:
                tensor.copy_(found[key])
            elif kind == "anchor":
                tensor.copy_(self.local(name))
            else:
                tensor.zero_()


def local_part(parameter: Tensor) -> Tensor:
    """The memory that this rank holds of a parameter: the shard of a ``DTensor``."""
    if is_dtensor(parameter):
        local: Tensor = parameter.to_local()  # type: ignore[attr-defined]
        return local.detach()
    return parameter.detach()
