"""The starting point of a training, kept right even if other code writes into the parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradcodec.errors import ConfigError, UpdateError
from gradcodec.types import TensorSpec, Update, UpdateSpec

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Anchor:
    """Parameters ``theta = start + moved``, where the caller decides ``moved`` only.

    It keeps ``start`` in fp32 or wider, and the values that it wrote last in the parameters' own
    dtype. A value whose bits differ from those was written by other code: loaded, clamped,
    averaged, replaced. Training continues from such values.

    Args:
        named: whole, dense parameters on one device.

    Raises:
        ConfigError: they are on several devices, or have no values yet.
    """

    def __init__(self, named: Mapping[str, nn.Parameter]) -> None:
        devices = sorted({str(p.device) for p in named.values()})
        if len(devices) != 1 or devices == ["meta"]:
            raise ConfigError(
                f"expected parameters with values, all on one device, got {devices or 'none'}"
            )
        self.named = dict(named)
        self.device = torch.device(devices[0])
        self._spec = UpdateSpec.of(self.named)
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Start from the parameters as they are."""
        # At least fp32: in bf16 the small steps of an update would be rounded away one by one.
        self.start = {
            n: p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone()
            for n, p in self.named.items()
        }
        self._written = {n: p.detach().clone() for n, p in self.named.items()}

    def check(self) -> None:
        """Raise ``UpdateError`` if a parameter's shape, dtype or device has changed."""
        for t in self._spec:
            p = self.named[t.name]
            if tuple(p.shape) != t.shape or p.dtype != t.dtype or p.device != self.device:
                raise UpdateError(
                    f"expected {t} on {self.device}, got "
                    f"{TensorSpec(t.name, tuple(p.shape), p.dtype)} on {p.device}: make a new "
                    "optimiser after .to(), .half() and the like"
                )

    @torch.no_grad()
    def touched(self) -> bool:
        """Whether somebody else wrote into a parameter; waits for the device once."""
        if not self.named:
            return False
        return bool(
            torch.stack(
                [(_bits(p) != _bits(self._written[n])).any() for n, p in self.named.items()]
            ).any()
        )

    @torch.no_grad()
    def settle(self, moved: Update) -> None:
        """Make the current point the start: what others wrote, and ``start + moved`` elsewhere.

        The parameters themselves do not change; in bf16 ``start`` keeps digits that they lack.
        """
        for name, p in self.named.items():
            mine = _bits(p) == _bits(self._written[name])
            here = self.start[name] + moved[name]
            self.start[name] = torch.where(mine, here, p.detach().to(here.dtype))
            self._written[name].copy_(p)

    @torch.no_grad()
    def write(self, moved: Update) -> None:
        """Set the parameters to ``start + moved``, rounded once to their dtype."""
        for name, p in self.named.items():
            p.copy_(self.start[name] + moved[name])
            self._written[name].copy_(p)

    @torch.no_grad()
    def equals(self, state: Update) -> bool:
        """Whether ``state`` equals ``start`` exactly, on any device and in any dtype."""
        for name, start in self.start.items():
            if name not in state or state[name].shape != start.shape:
                return False
            came = state[name].detach()
            wide = torch.promote_types(start.dtype, came.dtype)
            if not torch.equal(start.to(wide), came.to(start.device, wide)):
                return False
        return True

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of ``start``."""
        return {n: t.clone() for n, t in self.start.items()}

    def checked(self, state: Update) -> dict[str, Tensor]:
        """A copy of what ``state_dict`` gave, on the parameters' device.

        Raises:
            UpdateError: ``state`` belongs to other parameters.
        """
        UpdateSpec.of(self.start).check(state)
        return {n: state[n].to(t.device, copy=True) for n, t in self.start.items()}


def _bits(values: Tensor) -> Tensor:
    """The bit patterns: NaN equals itself, and -0.0 is not 0.0."""
    return values.detach().view(_BITS[values.element_size()])
