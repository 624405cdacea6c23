"""Which parameters are exchanged in which local step: a function of sizes and settings alone.

step        1 ... H/P ... 2H/P ... H ...          H local steps, P fragments
sent           0          1      P-1  0 ...       fragment p in the steps t = (p+1) H/P mod H
merged         0 tau later ...
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gradcodec.errors import ConfigError


@dataclass(frozen=True)
class Schedule:
    """When each fragment is sent, and when what came back is merged.

    Attributes:
        every: ``H``, local steps between two exchanges of one parameter.
        fragments: ``P``, which divides ``H``.
        overlap: ``tau < H``, local steps between sending and merging.

    Raises:
        ConfigError: names the setting, what was expected and what came.
    """

    every: int
    fragments: int = 1
    overlap: int = 0

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("fragments", 1), ("overlap", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"expected {name} of {least} or more, got {value!r}")
        if self.every % self.fragments:
            raise ConfigError(
                f"expected every to be a multiple of fragments, got every={self.every} and "
                f"fragments={self.fragments}: fragments take turns at equal distances"
            )
        if self.overlap >= self.every:
            raise ConfigError(
                f"expected overlap under every={self.every}, got {self.overlap}: a fragment is "
                "merged before it is sent again"
            )

    def sent(self, step: int) -> int | None:
        """The fragment that is sent after local step ``step`` (from 1), if there is one."""
        apart = self.every // self.fragments
        return None if step % apart else (step // apart - 1) % self.fragments

    def merged(self, step: int) -> int | None:
        """The fragment that is merged after local step ``step``, if there is one."""
        return self.sent(step - self.overlap) if step > self.overlap else None

    def in_flight(self, step: int) -> list[int]:
        """Fragments that are sent and not yet merged when ``step`` is done, the first one first."""
        found = (self.sent(t) for t in range(max(1, step - self.overlap + 1), step + 1))
        return [p for p in found if p is not None]


def fragments_of(numels: Mapping[str, int], count: int) -> list[list[str]]:
    """Share parameters out to ``count`` fragments of about equal size; names in their order.

    The largest parameters go first, each to the fragment that is smallest so far.

    Raises:
        ConfigError: there are fewer parameters than fragments.
    """
    if count > len(numels):
        raise ConfigError(
            f"expected at most one fragment for each of the {len(numels)} trainable parameters, "
            f"got fragments={count}"
        )
    of: dict[str, int] = {}
    # A parameter counts at least 1, so that none of the fragments stays empty.
    sizes = [0] * count
    for name in sorted(numels, key=lambda n: -numels[n]):
        p = sizes.index(min(sizes))
        of[name] = p
        sizes[p] += max(1, numels[name])
    return [[n for n in numels if of[n] == p] for p in range(count)]
