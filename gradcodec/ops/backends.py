"""Who computes an op: torch, the C accelerator, or Triton kernels; decided by device at import."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from gradcodec import native
from gradcodec.errors import ConfigError
from gradcodec.ops import adapters
from gradcodec.ops.schemas import NAMES, NAMESPACE

Op = Callable[..., Any]

#: What CPU tensors are given to, once for the process: bytes are equal, speeds are not.
CPU = "native" if native.available() else "reference"


def implementation(device: torch.device | str) -> str:
    """Name of what computes on a device when nothing is asked for."""
    kind = torch.device(device).type
    if kind == "cpu":
        return CPU
    return "triton" if kind == "cuda" else "reference"


def status() -> dict[str, str]:
    """Every implementation and whether it is there; for ``gradcodec info``."""
    return {
        "reference": "torch, any device",
        "native": native.status(),
        "triton": _why_no_triton() or "installed, for CUDA tensors",
    }


def pick(name: str, device: torch.device, impl: str | None) -> Op:
    """The op for a device, or the one asked for by name; ``ConfigError`` if it cannot be had."""
    if impl is None:
        op: Op = getattr(getattr(torch.ops, NAMESPACE), name).default
        return op
    if impl == "reference":
        return adapters.REFERENCE[name]
    if impl == "native":
        if device.type != "cpu" or not native.available():
            raise ConfigError(
                f"impl='native' is for CPU tensors, got {device}; it is {native.status()}"
            )
        return adapters.NATIVE.get(name, adapters.REFERENCE[name])
    if impl == "triton":
        missing = _why_no_triton()
        if missing:
            raise ConfigError(f"impl='triton': {missing}")
        return adapters.triton(name)
    raise ConfigError(f"expected impl of 'reference', 'native', 'triton' or None, got {impl!r}")


def _why_no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed: pip install 'gradcodec[gpu]'"
    return ""


def _on_cuda(name: str) -> Op:
    def run(*args: Any) -> Any:
        return pick(name, torch.device("cuda"), "triton")(*args)

    return run


for _name in NAMES:
    _cpu = adapters.NATIVE.get(_name) if CPU == "native" else None
    torch.library.impl(f"{NAMESPACE}::{_name}", "CPU")(_cpu or adapters.REFERENCE[_name])
    torch.library.impl(f"{NAMESPACE}::{_name}", "CUDA")(_on_cuda(_name))
