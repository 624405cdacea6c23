"""The implementations of an op: torch, the C library, Triton kernels; by device, or by name."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradcodec import native
from gradcodec.errors import ConfigError
from gradcodec.reference.hadamard import rotation_factors

#: The default on CPU, fixed for the process: both give equal bytes, but not at equal speed.
CPU = "native" if native.available() else "reference"


def implementation(device: torch.device | str) -> str:
    """The implementation that a device uses if none is asked for."""
    kind = torch.device(device).type
    if kind == "cpu":
        return CPU
    return "triton" if kind == "cuda" else "reference"


def status() -> dict[str, str]:
    """Every implementation and whether it is available; for ``gradcodec info``."""
    return {
        "reference": "torch, any device",
        "native": native.status(),
        "triton": why_no_triton() or "installed, for CUDA tensors",
    }


class KernelLimitError(ConfigError):
    """The kernel of an op does not take settings that the op itself takes."""


@dataclass(frozen=True)
class Op:
    """An op and its implementations.

    The C function in ``gradcodec.native`` and the kernel in ``gradcodec_kernels`` have the op's
    name. Both write into the outputs that the declaration makes.

    Attributes:
        name: of the op, its C function and its kernel.
        declaration: checks the arguments and returns empty outputs.
        reference: computes with torch, on any device.
    """

    name: str
    declaration: Callable[..., Any]
    reference: Callable[..., Any]

    def on(self, device: torch.device, impl: str) -> Callable[..., Any]:
        """The implementation of this name; ``ConfigError`` with the reason if it is unavailable."""
        if impl == "reference":
            return self.by_reference
        if impl == "native":
            if device.type != "cpu" or not native.available():
                raise ConfigError(
                    f"impl='native' is for CPU tensors, got {device}; it is {native.status()}"
                )
            return self.by_native
        if impl == "triton":
            missing = why_no_triton()
            if missing:
                raise ConfigError(f"impl='triton': {missing}")
            return self.by_triton
        raise ConfigError(f"expected impl of 'reference', 'native', 'triton' or None, got {impl!r}")

    def by_reference(self, *args: Any, **settings: Any) -> Any:
        """Call the reference, after the checks of the declaration."""
        self.declaration(*args, **settings)
        return self.reference(*args, **settings)

    def by_native(self, *args: Any, **settings: Any) -> Any:
        """Call the C function, which writes into the declaration's outputs."""
        out = self.declaration(*args, **settings)
        getattr(native, self.name)(*args, **{**self.defaults, **settings}, out=out)
        return out

    def by_triton(self, *args: Any, **settings: Any) -> Any:
        """Call the kernel: tensors, then outputs, then the settings that it has parameters for."""
        out = self.declaration(*args, **settings)
        run = kernel(self.name)
        settings = {**self.defaults, **settings}
        device = args[0].device
        if "rotate" in settings:
            settings["rotation"] = _rotation(device) if settings["rotate"] else None
        wanted = _parameters(self.name)
        tensors = [a for a in args if isinstance(a, Tensor)]
        outputs = out if isinstance(out, tuple) else (out,)
        # Triton launches on the current device, whatever device its arguments are on.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            try:
                run(*tensors, *outputs, **{k: v for k, v in settings.items() if k in wanted})
            except ValueError as limit:
                raise KernelLimitError(
                    f"{self.name} on a GPU: {limit}; impl='reference' takes it"
                ) from limit
        return out

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        """Optional settings and their defaults; the dispatcher omits settings that equal these."""
        parameters = inspect.signature(self.declaration).parameters.values()
        return {
            p.name: p.default
            for p in parameters
            if p.default is not inspect.Parameter.empty and p.name != "impl"
        }


def why_no_triton() -> str:
    """Why kernels cannot be launched here; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "not installed: pip install 'gradcodec[gpu]'"
    return ""


@functools.cache
def kernel(name: str) -> Callable[..., None]:
    """The launcher of a kernel; imports Triton."""
    launcher: Callable[..., None] = getattr(
        importlib.import_module(f"gradcodec_kernels.{name}"), name
    )
    return launcher


@functools.cache
def _parameters(name: str) -> frozenset[str]:
    return frozenset(inspect.signature(kernel(name)).parameters)


@functools.cache
def _rotation(device: torch.device) -> tuple[Tensor, Tensor]:
    left, right = rotation_factors(device)
    return left.to(torch.bfloat16).contiguous(), right.to(torch.bfloat16).contiguous()
