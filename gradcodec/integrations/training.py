"""What adapters of training frameworks share: a rank's state in a file, and figures to log."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gradcodec import files
from gradcodec.distributed.compression import Compression, State
from gradcodec.errors import ConfigError

logger = logging.getLogger(__name__)

_WAY_OUT = "delete it to go on without error feedback of the last step"
_SAMPLE = 256


def parallel() -> bool:
    """Whether there is another process to send gradients to; says so in the log if not."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return True
    logger.warning("gradcodec: one process alone sends no gradients, nothing is compressed")
    return False


def file_in(folder: str | Path, model: int = 0) -> Path:
    """The file of this rank in a checkpoint's folder, for the first model or a later one."""
    which = f"_{model}" if model else ""
    return Path(folder) / f"gradcodec{which}-rank{dist.get_rank()}.safetensors"


def save(compression: Compression, path: Path, weights: str = "") -> None:
    """Write this rank's state into a checkpoint; the file appears whole or not at all.

    Args:
        compression: whose state.
        path: what ``file_in`` returned.
        weights: ``fingerprint`` of the weights that the state belongs to.

    Raises:
        OSError: it cannot be written.
    """
    tensors, numbers = _apart(compression.state_dict())
    files.save_tensors(path, tensors, {"numbers": numbers, "weights": weights})


def load(compression: Compression, path: Path, device: torch.device, weights: str = "") -> bool:
    """Read what ``save`` wrote, on all ranks or on none; whether it was read.

    If a rank lacks its file (it is new, the checkpoint is from before), or the file belongs to
    other ``weights``, training goes on, loses what error feedback held, and a log line says so.

    Raises:
        ConfigError: a rank's file is damaged, on all ranks; or it is of another model.
    """
    if not everywhere(path.exists(), device):
        logger.warning("gradcodec: not every rank has its %s: error feedback starts anew", path)
        return False
    fault: ConfigError | None = None
    state: State = {}
    meta: dict[str, Any] = {}
    try:
        tensors, meta = files.load_tensors(path, _WAY_OUT)
        state = {**tensors, **_numbers(path, meta)}
    except ConfigError as err:
        fault = err
    if not everywhere(fault is None, device):  # or the others would wait for this rank
        raise fault or ConfigError(f"another rank's state in {path.parent} is damaged")
    if not everywhere(meta.get("weights", "") == weights, device):
        logger.warning(
            "gradcodec: %s belongs to other weights than training goes on from: error feedback "
            "starts anew; CompressCallback(resume_from=) names the checkpoint if it is elsewhere",
            path,
        )
        return False
    compression.load_state_dict(state)
    return True


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the first 256 values of each trainable parameter, of this rank's part of it."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if parameter.requires_grad:
            part = getattr(parameter, "to_local", lambda p=parameter: p)().detach()
            first = part.reshape(-1)[:_SAMPLE].contiguous().view(torch.uint8)
            digest.update(first.cpu().numpy().tobytes())
    return digest.hexdigest()


def everywhere(here: bool, device: torch.device) -> bool:
    """Whether something is so on every rank; all of them ask."""
    found = torch.tensor([int(here)], device=device)
    dist.all_reduce(found, dist.ReduceOp.MIN)
    return bool(found.item())


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device


def gathered(state: State, device: torch.device) -> list[Tensor] | None:
    """The states of all ranks as bytes (uint8), on rank 0; ``None`` on the others.

    For frameworks whose checkpoint is one file, which rank 0 writes.
    """
    tensors, numbers = _apart(state)
    named = {**tensors, **{f"#{name}": torch.tensor(n) for name, n in numbers.items()}}
    blob = safetensors.torch.save({n: t.contiguous() for n, t in named.items()})
    mine = torch.frombuffer(bytearray(blob), dtype=torch.uint8).to(device)
    world = dist.get_world_size()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(mine)], device=device))
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: len(mine)] = mine
    first = dist.get_rank() == 0
    rows = [torch.empty_like(padded) for _ in range(world)] if first else None
    dist.gather(padded, rows)
    if rows is None:
        return None
    return [row[: int(size)].cpu().clone() for row, size in zip(rows, sizes, strict=True)]


def state_from(row: Tensor) -> State:
    """One rank's state of what ``gathered`` made.

    Raises:
        ConfigError: these bytes are not one.
    """
    try:
        named = safetensors.torch.load(row.numpy().tobytes())
    except Exception as err:  # whatever safetensors calls it
        raise ConfigError(f"expected a rank's state in safetensors: {err}") from err
    return {
        name.removeprefix("#"): int(t) if name.startswith("#") else t for name, t in named.items()
    }


class Figures:
    """What a step cost since the last time that somebody asked, for a framework's logger."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}

    def since(self, compression: Compression) -> dict[str, float]:
        """Ratio of dense to sent bytes, and milliseconds a step; empty if there was no step."""
        now = {k: float(v) for k, v in compression.stats().items() if isinstance(v, int | float)}
        gone = {key: value - self._before.get(key, 0.0) for key, value in now.items()}
        self._before = now
        if not gone["steps"] or not gone["wire_bytes"]:
            return {}
        return {
            "gradcodec/ratio": gone["dense_wire_bytes"] / gone["wire_bytes"],
            **{
                f"gradcodec/{part}_ms": 1e3 * gone[f"{part}_seconds"] / gone["steps"]
                for part in ("encode", "exchange", "decode")
            },
        }


def _apart(state: State) -> tuple[dict[str, Tensor], dict[str, int]]:
    tensors = {n: v for n, v in state.items() if isinstance(v, Tensor)}
    return tensors, {n: v for n, v in state.items() if not isinstance(v, Tensor)}


def _numbers(path: Path, meta: Mapping[str, Any]) -> dict[str, int]:
    numbers = meta.get("numbers")
    if not isinstance(numbers, dict) or not all(type(v) is int for v in numbers.values()):
        raise ConfigError(f"{path}: expected whole numbers by name, got {numbers!r}; {_WAY_OUT}")
    return numbers
