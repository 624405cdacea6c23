"""What every scheme has that trains ranks over a network, whatever it exchanges and when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from benchmarks.ddp.trainers import Trainer
from benchmarks.peers.ddp.checkout import Checkout

S = TypeVar("S", bound="Scheme")


@dataclass(frozen=True)
class Scheme:
    """One way of training.

    Attributes:
        name: key in rows and on the command line.
        title: what a reader of tables and plots sees.
        kind: ``"reference"`` (plain DDP), ``"ours"`` or ``"peer"``.
        make: one rank's trainer; all ranks call it at the same time.
        cite: where it is from.
        checkout: what must be there to run it.
        quick: part of the short form.
    """

    name: str
    title: str
    kind: str
    make: Callable[..., Trainer]
    cite: str = ""
    checkout: Checkout | None = None
    quick: bool = False

    def missing(self) -> str | None:
        """What is to be done before it can run, ``None`` if nothing."""
        return self.checkout.missing() if self.checkout else None


def available(schemes: Sequence[S]) -> list[S]:
    """Those whose code is there; a line about each other one."""
    out = []
    for scheme in schemes:
        reason = scheme.missing()
        if reason:
            print(f"left out: {scheme.title}: {reason}", flush=True)
        else:
            out.append(scheme)
    return out


def chosen_codec(codec: str | Callable[[], Any]) -> Any:
    """A codec's name, or the codec that a function makes in the rank's process."""
    return codec if isinstance(codec, str) else codec()
