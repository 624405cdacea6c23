"""What a federation has broadcast, and the fewest bytes that bring a client up to date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.federated.envelope import CODEC, INCREMENT, SNAPSHOT, Part, part_nbytes
from gradcodec.federated.replica import Replica
from gradcodec.federated.switch import Switch

Parts = list[Part]


@dataclass
class Phase:
    """A stretch of rounds with one codec.

    Attributes:
        first: its first round.
        switch: the switch that began it; ``None`` for the first phase.
        increments: the increments of its rounds so far, as bytes.
        end: snapshot of the position it ended at, if that is shorter than its increments; else
            empty.
    """

    first: int = 0
    switch: Switch | None = None
    increments: list[bytes] = field(default_factory=list)
    end: bytes = b""


class History:
    """The phases of a federation; with a fixed codec there is only one."""

    def __init__(self) -> None:
        self.phases = [Phase()]

    @property
    def current(self) -> Phase:
        """The phase of the next round."""
        return self.phases[-1]

    def add(self, increment: bytes) -> None:
        """Record the increment of a round that was closed."""
        self.current.increments.append(increment)

    def enter(self, switch: Switch, end: bytes) -> None:
        """Begin a phase with another codec; ``end`` is a snapshot of where the last one ended."""
        missed: Parts = [(INCREMENT, b) for b in self.current.increments]
        if part_nbytes([(SNAPSHOT, end)]) < part_nbytes(missed):
            self.current.end = end
        self.phases.append(Phase(switch.first, switch))

    def since(self, version: int, now: Replica) -> Parts:
        """The parts that bring a client from ``version`` to the current round.

        For each phase that it has missed rounds of: the phase's codec, unless the client has it,
        then the increments or a snapshot, whichever is shorter.

        Args:
            version: the round that the client is at.
            now: the current state.
        """
        parts: Parts = []
        for phase in self.phases[self._phase_of(version) :]:
            if phase.first > version:
                assert phase.switch is not None
                parts.append((CODEC, phase.switch.to_bytes()))
            parts += self._steps(phase, max(version, phase.first), now)
        return parts

    def spans(self, version: int) -> int:
        """How many phases there are from that of ``version`` to the current one."""
        return len(self.phases) - self._phase_of(version)

    def anew(self, now: Replica) -> Parts:
        """Parts for a client at any round: the current codec, the state it began at, the steps."""
        phase = self.current
        assert phase.switch is not None
        coded: Parts = [(CODEC, phase.switch.to_bytes(now.coded))]
        return coded + self._steps(phase, phase.first, now)

    def until(self, version: int) -> Parts:
        """Every increment and codec up to a round."""
        parts: Parts = []
        for phase in self.phases:
            if phase.first > version:
                break
            if phase.switch is not None:
                parts.append((CODEC, phase.switch.to_bytes()))
            parts += [(INCREMENT, b) for b in phase.increments[: version - phase.first]]
        return parts

    def state_dict(self) -> dict[str, Tensor]:
        """Increments and codecs by round, as bytes."""
        out: dict[str, Tensor] = {}
        number = 0
        for phase in self.phases:
            if phase.switch is not None:
                out[f"codec.{phase.first:06d}"] = as_tensor(phase.switch.to_bytes())
            for blob in phase.increments:
                out[f"increment.{number:06d}"] = as_tensor(blob)
                number += 1
        return out

    def _phase_of(self, version: int) -> int:
        return max(i for i, phase in enumerate(self.phases) if phase.first <= version)

    def _steps(self, phase: Phase, version: int, now: Replica) -> Parts:
        """The fewest bytes from ``version`` to the end of a phase."""
        missed: Parts = [(INCREMENT, b) for b in phase.increments[version - phase.first :]]
        if now.space.absolute:  # an increment is a whole state
            return missed[-1:]
        if phase is not self.current:
            snapshot = phase.end
        elif part_nbytes(missed) <= now.snapshot_nbytes:
            return missed
        else:
            snapshot = now.snapshot().to_bytes()
        end: Parts = [(SNAPSHOT, snapshot)]
        return end if snapshot and part_nbytes(end) < part_nbytes(missed) else missed


def recorded(state: Mapping[str, Tensor]) -> Parts:
    """Increments and codecs of a ``state_dict``, in the order in which they were broadcast.

    Raises:
        ConfigError: some are missing, or others are there.
    """
    found = {n: as_bytes(n, t) for n, t in state.items() if n.startswith(_NAMES)}
    parts: Parts = []
    steps = sum(name.startswith("increment.") for name in found)
    try:
        for number in range(steps + 1):
            coded = found.pop(f"codec.{number:06d}", None)
            if coded is not None:
                parts.append((CODEC, coded))
            if number < steps:
                parts.append((INCREMENT, found.pop(f"increment.{number:06d}")))
    except KeyError as err:
        raise ConfigError(f"server state: {err} is missing") from err
    if found:
        raise ConfigError(f"server state: not expected: {sorted(found)[:3]}")
    return parts


_NAMES = ("codec.", "increment.")


def as_bytes(name: str, tensor: Tensor) -> bytes:
    """Inverse of ``as_tensor``; ``ConfigError`` for a tensor that does not hold bytes."""
    if tensor.dtype != torch.uint8 or tensor.ndim != 1:
        raise ConfigError(
            f"server state: expected {name} as bytes, got {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor.numpy().tobytes()


def as_tensor(blob: bytes) -> Tensor:
    """Bytes as a tensor, uint8."""
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8)
