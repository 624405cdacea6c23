"""Makes an op's schema, fake, checks and implementations from its one declaration.

A declaration is a typed function of the op's arguments. It raises ``ConfigError`` for arguments
that do not fit, and returns empty outputs. Everything else is derived from it and from the oracle
(the reference implementation):

* the schema that ``torch.library`` and ``torch.compile`` see: ops are opaque to the compiler and
  work under ``fullgraph=True``;
* the fake: the declaration itself, which reads no tensor's values;
* the implementations for CPU and CUDA tensors (``gradcodec.ops.backends``);
* the public function, which takes ``impl=`` as well.

Tensors come first, by position, and are made contiguous. Four names mean the same in every op:
``residual`` is updated in place, ``seed`` has 64 bits, ``weights`` has a factor for each payload,
and ``impl`` is not an argument of the op but chooses its implementation.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from gradcodec.ops.backends import CPU, KernelLimitError, Op

NAMESPACE = "gradcodec"

OPS: dict[str, Op] = {}
"""Every declared op by its name."""

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    tuple[Tensor, Tensor]: "(Tensor, Tensor)",
    bool: "bool",
    int: "int",
    str: "str",
    torch.dtype: "ScalarType",
}

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def op(
    reference: Callable[..., Any],
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Make an op from a declaration, with ``reference`` as its oracle."""

    def declare(declaration: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        made = Op(declaration.__name__, declaration, reference)
        qualified = f"{NAMESPACE}::{made.name}"
        torch.library.define(qualified, schema(declaration))
        torch.library.register_fake(qualified)(declaration)
        on_cpu = made.on(torch.device("cpu"), CPU)
        torch.library.impl(qualified, "CPU")(on_cpu)
        torch.library.impl(qualified, "CUDA")(on_cuda(made))
        OPS[made.name] = made
        return _public(made, declaration)

    return declare


def registered(name: str) -> Any:
    """The op as ``torch.ops`` has it."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def schema(declaration: Callable[..., Any]) -> str:
    """The declaration's signature as ``torch.library`` writes it, without ``impl``."""
    hints = typing.get_type_hints(declaration)
    parts, keyword_only = [], False
    for parameter in inspect.signature(declaration).parameters.values():
        if parameter.name == "impl":
            continue
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        kind = _TYPES[hints[parameter.name]]
        if parameter.name == "residual":
            kind = "Tensor(a!)?"
        default = parameter.default
        given = "" if default is inspect.Parameter.empty else f"={_literal(default)}"
        parts.append(f"{kind} {parameter.name}{given}")
    return f"({', '.join(parts)}) -> {_TYPES[hints['return']]}"


def _literal(default: Any) -> str:
    if isinstance(default, str):
        return f'"{default}"'
    return str(default).removeprefix("torch.")


def on_cuda(made: Op) -> Callable[..., Any]:
    """What the dispatcher calls for CUDA tensors; Triton is imported only in this call.

    A kernel checks its limits before it writes anything; torch computes what it refuses.
    """

    def run(*args: Any, **settings: Any) -> Any:
        try:
            return made.on(args[0].device, "triton")(*args, **settings)
        except KernelLimitError:
            return made.by_reference(*args, **settings)

    return run


def _public(made: Op, declaration: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    default = registered(made.name)

    @functools.wraps(declaration)
    def call(*args: _Arguments.args, **settings: _Arguments.kwargs) -> _Result:
        impl: Any = settings.pop("impl", None)
        given: dict[str, Any] = dict(settings)
        if "seed" in given:
            given["seed"] = _int64(given["seed"])
        if given.get("weights") is not None:
            given["weights"] = given["weights"].contiguous()
        tensors = [_contiguous(a) for a in args]
        if impl is None:
            result: _Result = default(*tensors, **given)
        else:
            result = made.on(tensors[0].device, impl)(*tensors, **given)
        return result

    return call


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def _int64(seed: int) -> int:
    """The low 64 bits of a seed as a signed number, which a schema requires."""
    low = seed & 0xFFFFFFFFFFFFFFFF
    return low - (1 << 64) if low >> 63 else low
