"""One row of the federated benchmark's list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.federated.methods import Method
from benchmarks.federated.world import World

GRID = (6e-3, 1.2e-2, 2.4e-2)
KINDS = ("reference", "ours", "paper", "peer")

Make = Callable[[World], Method]


@dataclass(frozen=True)
class Scheme:
    """One way of sending updates.

    Attributes:
        name: key in rows and on the command line.
        title: what a reader of tables and plots sees.
        kind: ``"reference"`` (no compression), ``"ours"``, ``"paper"`` (CG-FedLLM's) or ``"peer"``.
        make: both ends of a fresh federation.
        cite: where it is from.
        grid: learning rates that it is tried with, as many as all others.
        quick: part of the short form.
        plotted: has a line in the plots; tables have everything.
    """

    name: str
    title: str
    kind: str
    make: Make
    cite: str = ""
    grid: tuple[float, ...] = GRID
    quick: bool = False
    plotted: bool = True
