"""Checkpoints of the centralised training after each round: parameters, optimiser, reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from gradcodec import files
from gradcodec.errors import ConfigError
from gradcodec.federated.loop import RoundReport


def save_training(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    reports: Sequence[RoundReport],
) -> None:
    """Write one sealed safetensors file; the previous one is kept."""
    tensors: dict[str, torch.Tensor] = {f"parameter/{n}": p for n, p in parameters.items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{number}/{key}": t for key, t in state.items()}
    files.save_tensors(path, tensors, {"reports": [r.to_dict() for r in reports]}, keep=True)


@torch.no_grad()
def load_training(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[RoundReport]:
    """Restore parameters and optimiser as ``save_training`` saved them; returns the saved reports.

    Raises:
        ConfigError: the file is damaged, or belongs to other parameters.
    """
    way_out = "delete it to train again from the start"
    tensors, meta = files.load_tensors(path, way_out)
    states: dict[int, dict[str, torch.Tensor]] = {}
    try:
        for name, p in parameters.items():
            p.copy_(tensors.pop(f"parameter/{name}"))
        for name, t in tensors.items():
            _, number, key = name.split("/")
            states.setdefault(int(number), {})[key] = t
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
        return [RoundReport.from_dict(row) for row in meta["reports"]]
    except (KeyError, TypeError, ValueError, RuntimeError) as err:
        raise ConfigError(f"{path} is not of this training: {err!r}; {way_out}") from err
