"""Error feedback: what coding lost, kept by name until it is sent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradcodec.distributed.coders import Coder
from gradcodec.distributed.parts import cut, turn
from gradcodec.errors import ConfigError

_FIRST, _SECOND, _WORLD, _RANK = "first.", "second.", "world", "rank"


class Residuals:
    """Residuals of both shots of an all-reduce by tensor name (Seide et al. 2014).

    The first is of this rank's own values, the second of the means of the parts it owns. Made where
    they are first asked for. One object belongs to one rank, one codec per name.
    """

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self.world: int | None = None
        self.rank: int | None = None

    def of(
        self, name: str, values: Tensor, coder: Coder, rank: int, world: int
    ) -> tuple[Tensor, Tensor]:
        """First ``[coder.residual_numel(n)]`` and second residual of a tensor, fp32.

        Raises:
            ConfigError: a residual of that name has another length, or these residuals were made
                by another rank or in a world of another size.
        """
        if self.world is None:
            self.world, self.rank = world, rank
        if (self.world, self.rank) != (world, rank):
            raise ConfigError(
                f"residuals of rank {self.rank} of {self.world} cannot serve rank {rank} of {world}"
            )
        parts = cut(values.numel(), world, coder.align)
        start, stop = parts[(rank - turn(name, world)) % world]
        sizes = (
            sum(coder.residual_numel(b - a) for a, b in parts),
            coder.residual_numel(stop - start),
        )
        found = []
        for kept, size in zip((self.first, self.second), sizes, strict=True):
            one = kept.get(name)
            if one is None or one.device != values.device:
                one = torch.zeros(size) if one is None else one
                one = kept[name] = one.to(values.device)
            if one.numel() != size:
                raise ConfigError(
                    f"{name!r}: expected a residual of {size} values, got {one.numel()}; it was "
                    "made for another codec or another shape"
                )
            found.append(one)
        return found[0], found[1]

    @property
    def nbytes(self) -> int:
        """Memory of all residuals."""
        both = (*self.first.values(), *self.second.values())
        return sum(t.numel() * t.element_size() for t in both)

    def state_dict(self) -> dict[str, Tensor | int]:
        """Flat: ``first.NAME``, ``second.NAME``, ``world``, ``rank``; copies on the CPU."""
        out: dict[str, Tensor | int] = {}
        if self.world is not None and self.rank is not None:
            out = {_WORLD: self.world, _RANK: self.rank}
        for prefix, kept in ((_FIRST, self.first), (_SECOND, self.second)):
            out.update({prefix + n: t.detach().cpu().clone() for n, t in kept.items()})
        return out

    def load_state_dict(self, state: Mapping[str, Tensor | int], *, rank: int, world: int) -> None:
        """Inverse of ``state_dict``.

        Second residuals belong to parts, which are cut differently in a world of another size (and
        are other ones at another rank): there they are dropped, the first ones are kept.
        """
        same = (int(state.get(_WORLD, -1)), int(state.get(_RANK, -1))) == (world, rank)
        self.first, self.second = {}, {}
        for key, value in state.items():
            if key.startswith(_FIRST) and isinstance(value, Tensor):
                self.first[key.removeprefix(_FIRST)] = value.detach().float().clone()
            elif key.startswith(_SECOND) and isinstance(value, Tensor) and same:
                self.second[key.removeprefix(_SECOND)] = value.detach().float().clone()
        self.world, self.rank = world, rank
