"""Whole updates on disk: one safetensors file each, bounded in number, read one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from safetensors.torch import load_file, save_file
from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.types import Update


class SnapshotStore(Sequence[dict[str, Tensor]]):
    """A folder of updates in the order in which they were added.

    Memory holds one update at a time. When ``limit`` is reached, every second snapshot is dropped
    and from then on only every second (fourth, ...) one is kept, so that the store always spans the
    whole time: the *temporal ensemble* of the paper, thinned evenly.

    Args:
        folder: created if missing; an existing store goes on where it was.
        limit: most snapshots kept, at least 2.
    """

    def __init__(self, folder: str | Path, *, limit: int = 1024) -> None:
        if limit < 2:
            raise ConfigError(f"snapshots: expected a limit of at least 2, got {limit}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.limit = limit
        self._files = sorted(self.folder.glob("*.safetensors"))
        stems = [int(f.stem) for f in self._files]
        self._seen = stems[-1] + 1 if stems else 0
        # A store that was thinned before goes on as thin as it is.
        self._stride = stems[1] - stems[0] if len(stems) > 1 else 1

    def add(self, update: Update) -> None:
        """Store one update, or skip it when the store is thinned."""
        if self._seen % self._stride == 0:
            path = self.folder / f"{self._seen:09d}.safetensors"
            save_file({n: t.detach().cpu().contiguous() for n, t in update.items()}, path)
            self._files.append(path)
        self._seen += 1
        if len(self._files) > self.limit:
            for path in self._files[1::2]:
                path.unlink()
            self._files = self._files[::2]
            self._stride *= 2

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if isinstance(index, slice):
            return [load_file(f) for f in self._files[index]]
        return load_file(self._files[index])
