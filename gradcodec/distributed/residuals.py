"""Error feedback: what coding lost, kept by name until it is sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gradcodec.distributed.coding import CodecCoder, Coder
from gradcodec.distributed.shards import Ranges, first_owner, shard_ranges
from gradcodec.errors import ConfigError

Saved = dict[str, tuple[list[Tensor], ...]]
"""By name: first residuals, then second ones."""

_FIRST, _SECOND, _WORLD, _RANK = "first.", "second.", "world", "rank"


class Residuals:
    """Residuals of both shots of an all-reduce by tensor name (Seide et al. 2014).

    The first residual is what coding this rank's values lost. The second is what coding the means
    of its own shards lost. Both start as zeros when they are first asked for. One object belongs to
    one rank, and each name in it to one codec.
    """

    def __init__(self) -> None:
        # Lists, since ``lanes.side_by_side`` replaces their tensors by views of one vector.
        self._first: dict[str, list[Tensor]] = {}
        self._second: dict[str, list[Tensor]] = {}
        self.world: int | None = None
        self.rank: int | None = None

    @property
    def first(self) -> dict[str, Tensor]:
        """Residuals of this rank's values by name; copies."""
        return {name: torch.cat(parts) for name, parts in self._first.items()}

    @property
    def second(self) -> dict[str, Tensor]:
        """Residuals of the means of own shards by name; copies."""
        return {name: torch.cat(parts) for name, parts in self._second.items()}

    def of(
        self, name: str, values: Tensor, coder: Coder, rank: int, world: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The first residual of each shard of a tensor, in order, and its second residual; fp32.

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
        shards = shard_ranges(values.numel(), world, coder.align)
        start, stop = shards[(rank - first_owner(name, world)) % world]
        sizes = [coder.residual_numel(b - a) for a, b in shards]
        first = self._kept(self._first, name, sizes, values)
        second = self._kept(self._second, name, [coder.residual_numel(stop - start)], values)
        return first, second

    def whole(self, name: str, values: Tensor, coder: Coder) -> list[Tensor]:
        """The first residual of a tensor that is coded whole, as a list of one; fp32."""
        return self._kept(self._first, name, [coder.residual_numel(values.numel())], values)

    def recode(
        self, name: str, numel: int, old: CodecCoder, new: CodecCoder, rank: int, world: int
    ) -> None:
        """Convert the residuals of a tensor ``[numel]`` to another coder's form."""
        for kept, ranges in self._places(name, numel, rank, world):
            kept[name] = [
                new.to_residual(old.from_residual(part, stop - start))
                for part, (start, stop) in zip(
                    self._parts(kept[name], ranges, old), ranges, strict=True
                )
            ]

    def take(self, name: str, values: Tensor, coder: CodecCoder, rank: int, world: int) -> None:
        """Add all that is kept for a tensor to its ``values`` ``[n]``, in place, and forget it.

        What coding the mean of an own shard lost counts ``world`` times: the values are averaged.
        """
        for kept, ranges in self._places(name, values.numel(), rank, world):
            factor = 1 if kept is self._first else world
            parts = self._parts(kept.pop(name), ranges, coder)
            for part, (start, stop) in zip(parts, ranges, strict=True):
                lost = coder.from_residual(part.to(values.device), stop - start)
                values[start:stop] += (factor * lost).to(values.dtype)

    def _places(
        self, name: str, numel: int, rank: int, world: int
    ) -> list[tuple[dict[str, list[Tensor]], Ranges]]:
        """The stores that hold residuals of this tensor, each with the ranges of its parts."""
        shards = shard_ranges(numel, world)
        own = shards[(rank - first_owner(name, world)) % world]
        both = ((self._first, shards), (self._second, [own]))
        return [(kept, ranges) for kept, ranges in both if name in kept]

    def _parts(self, found: list[Tensor], ranges: Ranges, coder: CodecCoder) -> list[Tensor]:
        """What is kept, by range; what was loaded is one piece."""
        sizes = [coder.residual_numel(stop - start) for start, stop in ranges]
        return list(torch.split(torch.cat(found), sizes))

    def has(self, names: Iterable[str]) -> bool:
        """Whether anything is kept for one of these names."""
        return any(name in kept for name in names for kept in self._both())

    def decay(self, names: Iterable[str], factor: float) -> None:
        """Multiply what is kept for these names by ``factor``, in place."""
        for name in names:
            for part in (*self._first.get(name, ()), *self._second.get(name, ())):
                part.mul_(factor)

    def saved(self, names: Iterable[str]) -> Saved:
        """Copies of what is kept for these names, for ``restore``."""
        return {
            name: tuple([t.clone() for t in kept.get(name, ())] for kept in self._both())
            for name in names
        }

    def restore(self, saved: Saved) -> None:
        """Keep again what was kept when ``saved`` was made."""
        for name, both in saved.items():
            for kept, parts in zip(self._both(), both, strict=True):
                kept.pop(name, None)
                if parts:
                    kept[name] = parts

    def forget(self) -> None:
        """Keep nothing, and belong to no rank yet."""
        self._first, self._second = {}, {}
        self.world = self.rank = None

    def _both(self) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
        return self._first, self._second

    def _kept(
        self, kept: dict[str, list[Tensor]], name: str, sizes: list[int], like: Tensor
    ) -> list[Tensor]:
        found = kept.get(name)
        if found is None:
            found = [torch.zeros(sum(sizes), device=like.device)]
        numels = [t.numel() for t in found]
        if sum(numels) != sum(sizes):
            raise ConfigError(
                f"{name!r}: expected a residual of {sum(sizes)} values, got {sum(numels)}; it was "
                "made for another codec or another shape"
            )
        if numels != sizes:  # new, or loaded
            found = list(torch.split(torch.cat(found), sizes))
        if any(t.device != like.device for t in found):
            found = [t.to(like.device) for t in found]
        kept[name] = found
        return found

    @property
    def nbytes(self) -> int:
        """Memory of all residuals."""
        both = (*self._first.values(), *self._second.values())
        return sum(t.numel() * t.element_size() for parts in both for t in parts)

    def state_dict(self) -> dict[str, Tensor | int]:
        """Flat: ``first.NAME``, ``second.NAME``, ``world``, ``rank``; copies on the CPU."""
        out: dict[str, Tensor | int] = {}
        if self.world is not None and self.rank is not None:
            out = {_WORLD: self.world, _RANK: self.rank}
        for prefix, kept in ((_FIRST, self.first), (_SECOND, self.second)):
            out.update({prefix + name: t.cpu() for name, t in kept.items()})
        return out

    def load_state_dict(self, state: Mapping[str, Tensor | int], *, rank: int, world: int) -> None:
        """Inverse of ``state_dict``.

        First residuals are kept. Second residuals belong to owned shards, so they are dropped if
        the number of ranks or this rank's number has changed.
        """
        same = (int(state.get(_WORLD, -1)), int(state.get(_RANK, -1))) == (world, rank)
        self._first, self._second = {}, {}
        for key, value in state.items():
            if key.startswith(_FIRST) and isinstance(value, Tensor):
                self._first[key.removeprefix(_FIRST)] = [value.detach().float().clone()]
            elif key.startswith(_SECOND) and isinstance(value, Tensor) and same:
                self._second[key.removeprefix(_SECOND)] = [value.detach().float().clone()]
        self.world, self.rank = world, rank
