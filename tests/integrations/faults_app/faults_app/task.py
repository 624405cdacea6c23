"""The model: a matrix that every node pulls towards a point of its own; and the events' file."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

PULL = 0.5


def initial() -> dict[str, nn.Parameter]:
    """The same everywhere."""
    g = torch.Generator().manual_seed(0)
    return {"w": nn.Parameter(torch.randn(64, 64, generator=g))}


def goal(node: int) -> torch.Tensor:
    return torch.randn(64, 64, generator=torch.Generator().manual_seed(1 + node))


def error(w: torch.Tensor) -> float:
    """Mean square distance to the mean of both goals."""
    return float((w - (goal(0) + goal(1)) / 2).square().mean())


def note(folder: str, **event: Any) -> None:
    """Add a line; each is one write, so processes may do so side by side."""
    with (Path(folder) / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


def hold(folder: str, node: int, seconds: float = 120) -> None:
    """Stay here while the test wants it."""
    end = time.monotonic() + seconds
    while (Path(folder) / f"hold-{node}").exists() and time.monotonic() < end:
        time.sleep(0.1)
