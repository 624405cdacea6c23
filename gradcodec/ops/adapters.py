"""Each implementation behind the positional signature of its op's schema."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gradcodec import native
from gradcodec.ops.schemas import FAKES, NAMES

Op = Callable[..., Any]


def _arguments(name: str) -> tuple[str, ...]:
    code = FAKES[name].__code__
    return code.co_varnames[: code.co_argcount]


def _by_keyword(name: str, function: Op) -> Op:
    names = _arguments(name)

    def op(*args: Any) -> Any:
        return function(**dict(zip(names, args, strict=True)))

    return op


def _reference(name: str) -> Op:
    module = importlib.import_module(f"gradcodec.reference.{name}")
    return _by_keyword(name, getattr(module, name))


REFERENCE = {name: _reference(name) for name in NAMES}

#: What the C library has; the rest stays torch.
NATIVE = {name: _by_keyword(name, getattr(native, name)) for name in NAMES if hasattr(native, name)}


def triton(name: str) -> Op:
    """The Triton implementation of an op; imports the kernel when it is first used."""
    from gradcodec.ops import cuda

    kernel: Op = getattr(cuda, name)

    def op(first: Tensor, *args: Any) -> Any:
        # Triton launches on the current device, whatever device its arguments are on.
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            return kernel(first, *args)

    return op
