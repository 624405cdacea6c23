"""Whole updates on disk: one safetensors file each, bounded in number, read one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from gradcodec import files
from gradcodec.errors import ConfigError
from gradcodec.types import Update


class SnapshotStore(Sequence[dict[str, Tensor]]):
    """A folder of updates in the order in which they were added.

    Memory holds one update at a time. When ``limit`` is reached, every second snapshot is dropped
    and from then on only every second (fourth, ...) one is kept, so that the store always spans the
    whole time: the *temporal ensemble* of the paper, thinned evenly.

    Each file appears whole or not at all and holds its SHA-256, which is checked when it is read.

    Args:
        folder: created if missing; an existing store goes on where it was.
        limit: largest number of snapshots kept, at least 2.

    Raises:
        ConfigError: the limit is below 2, snapshots are missing, or other safetensors files are in
            the folder.
    """

    def __init__(self, folder: str | Path, *, limit: int = 1024) -> None:
        if limit < 2:
            raise ConfigError(f"snapshots: expected a limit of at least 2, got {limit}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.limit = limit
        found = {}
        for path in self.folder.glob("*.safetensors"):
            if not path.stem.isdecimal():
                raise ConfigError(
                    f"{path} is no snapshot, whose names are numbers; expected a folder of "
                    "nothing else"
                )
            found[int(path.stem)] = path
        numbers = sorted(found)
        self._seen = numbers[-1] + 1 if numbers else 0
        # A store that was thinned before keeps its stride, which the gaps in its numbers show.
        gaps = [b - a for a, b in itertools.pairwise(numbers)]
        self._stride = min(gaps, default=1)
        if set(gaps) - {self._stride} and len(range(0, self._seen, self._stride)) > limit:
            # The process was killed in the middle of ``_thin``: finish it.
            self._stride *= 2
            for number in [n for n in numbers if n % self._stride]:
                found.pop(number).unlink()
        self._files = [found[n] for n in sorted(found)]
        self._check(range(0, numbers[-1] + 1 if numbers else 0, self._stride))

    def _check(self, expected: range) -> None:
        missing = set(expected) - {int(f.stem) for f in self._files}
        if missing:
            raise ConfigError(
                f"{self.folder}: {len(missing)} of {len(expected)} snapshots are missing, the "
                f"first of them {min(missing):09d}.safetensors; gather again into an empty folder"
            )

    def add(self, update: Update) -> None:
        """Store one update, or skip it when the store is thinned."""
        if self._seen % self._stride == 0:
            path = self.folder / f"{self._seen:09d}.safetensors"
            files.save_tensors(path, update, {})
            self._files.append(path)
        self._seen += 1
        if len(self._files) > self.limit:
            self._thin()

    def _thin(self) -> None:
        for path in self._files[1::2]:
            path.unlink()
        self._files = self._files[::2]
        self._stride *= 2

    def state_dict(self) -> dict[str, Tensor]:
        """How many updates were added, and the stride: one of every ``stride`` updates is kept."""
        return {"seen": torch.tensor(self._seen), "stride": torch.tensor(self._stride)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Forget what was added after ``state_dict`` was taken: those files are deleted.

        If the store was thinned since, it stays thinned: adding those updates again would lead to
        the same store.

        Raises:
            ConfigError: a snapshot of that time is missing; nothing is changed then.
        """
        seen, stride = (int(state[key]) for key in ("seen", "stride"))
        # After reopening a store with a single file, only the saved state knows the stride.
        stride = max(stride, self._stride)
        self._check(range(0, seen, stride))
        for path in self._files:
            if int(path.stem) >= seen:
                path.unlink()
        self._files = [f for f in self._files if int(f.stem) < seen]
        self._seen, self._stride = seen, stride

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if isinstance(index, slice):
            return [_read(f) for f in self._files[index]]
        return _read(self._files[index])


def _read(path: Path) -> dict[str, Tensor]:
    return files.load_tensors(path, "gather again into an empty folder")[0]
