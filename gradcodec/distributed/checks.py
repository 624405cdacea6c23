"""Checks of what a caller hands over: settings, options, parameters, loaded states.

They run in the call that takes an argument, since a later step would fail with it. Every wrapper
takes the same settings, so there is one function for each.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gradcodec.errors import ConfigError
from gradcodec.names import wrong_name
from gradcodec.parameters import NamedParameters, named_parameters

T = TypeVar("T")

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Dtypes that can be averaged."""

_OF_THE_MODEL = ("model", "codec", "process_group", "scattered")
"""Arguments that ``compress`` fills in itself."""

_COMPLEX = (torch.complex64, torch.complex128)


# -- settings -------------------------------------------------------------------------------------


def check_settings(
    *,
    error_feedback: object,
    seed: object,
    log_every: object,
    nmse_every: object = None,
    **counts: object,
) -> None:
    """Check the settings that all compressions have; ``counts`` are whole numbers of 0 or more.

    Raises:
        ConfigError: names the setting, what was expected and what came.
    """
    if not (isinstance(error_feedback, bool) or error_feedback == "auto"):
        raise ConfigError(
            f"expected error_feedback of True, False or 'auto', got {error_feedback!r}"
        )
    for name, count in counts.items():
        check_count(name, count)
    for name, every in (("log_every", log_every), ("nmse_every", nmse_every)):
        if every is not None and (type(every) is not int or every < 1):
            raise ConfigError(f"expected {name} of 1 or more or None, got {every!r}")
    check_seed(seed)


def check_count(name: str, count: object) -> None:
    """Check that ``count`` is a whole number of 0 or more."""
    if type(count) is not int or count < 0:
        raise ConfigError(f"expected {name} of 0 or more, got {count!r}")


def check_seed(seed: object) -> None:
    """Check that ``seed`` is a whole number of 64 bits."""
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise ConfigError(f"expected a seed that is an int of 64 bits, got {seed!r}")


def rule_pairs(rules: Iterable[tuple[str, T]]) -> list[tuple[str, T]]:
    """Rules as a list of ``(pattern, codec)``.

    Raises:
        ConfigError: the rules are not pairs, or a pattern is not a string.
    """
    way = "expected rules as a list of (pattern, codec) pairs, such as [('*.bias', 'fp32')]"
    if isinstance(rules, Mapping):
        raise ConfigError(f"{way}, got a {type(rules).__name__}: pass list(rules.items())")
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        raise ConfigError(f"{way}, got {rules!r}")
    pairs = list(rules)
    for pair in pairs:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ConfigError(f"{way}, got {pair!r} among them")
    return [(pattern, codec) for pattern, codec in pairs]


def check_options(what: str, takes: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Check the names of options before they are handed on to ``takes``.

    Raises:
        ConfigError: ``takes`` has no such option; the message lists those that it has.
    """
    known = [n for n in inspect.signature(takes).parameters if n not in _OF_THE_MODEL]
    strange = [n for n in options if n not in known]
    if strange:
        raise ConfigError(wrong_name(f"an option of {what}", strange[0], known))


# -- parameters -----------------------------------------------------------------------------------


def trainable(model: NamedParameters) -> dict[str, nn.Parameter]:
    """The trainable parameters of a model by name, all of which can be averaged.

    Raises:
        ConfigError: ``model`` is neither a model nor named parameters, or a parameter is lazy,
            without storage, sharded, or of a dtype that is not averaged.
    """
    found = named_parameters(model)
    for name, parameter in found.items():
        check_parameter(name, parameter)
    return found


def check_parameter(name: str, parameter: Tensor) -> None:
    """Check that a hook of DDP can average the gradients of a parameter."""
    if is_dtensor(parameter):
        raise ConfigError(
            f"{name!r} is a DTensor: for a model of fully_shard call compress(model); for tensor "
            "parallelism within DDP turn parameters into local tensors before wrapping "
            "(torch.distributed.tensor.parallel.ddp._pre_dp_module_transform)"
        )
    if parameter.is_meta:
        raise ConfigError(f"{name!r} is on the meta device: give the model storage first")
    check_dtype(name, parameter.dtype, (*FLOATS, *_COMPLEX))


def check_dtype(name: str, dtype: torch.dtype, allowed: Iterable[torch.dtype] = FLOATS) -> None:
    """Check that the gradients of a parameter of this dtype can be averaged."""
    if dtype not in allowed:
        known = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise ConfigError(
            f"expected trainable parameters of {known}; {name!r} is of {dtype}: freeze it with "
            "requires_grad_(False), or train it in one of these"
        )


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``: a part of a sharded or replicated whole."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def real_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter's gradient as real numbers; a complex number is a pair of them."""
    shape = tuple(parameter.shape)
    return (*shape, 2) if parameter.is_complex() else shape


# -- loaded states --------------------------------------------------------------------------------


def check_state(state: object, *needed: str) -> None:
    """Check for what ``state_dict`` returns: whole numbers and finite tensors by name.

    Args:
        state: the loaded state.
        needed: keys that must be there.

    Raises:
        ConfigError: names the key.
    """
    if not isinstance(state, Mapping):
        raise ConfigError(f"expected a state_dict, got {type(state).__name__}")
    missing = [key for key in needed if key not in state]
    if missing:
        raise ConfigError(f"expected the keys {' and '.join(map(repr, needed))}, {missing} missing")
    for key, value in state.items():
        if not isinstance(key, str):
            raise ConfigError(f"expected keys that are texts, got {key!r}")
        if isinstance(value, Tensor) and "." in key and value.is_floating_point():
            if not bool(torch.isfinite(value).all()):
                raise ConfigError(f"{key!r}: expected finite values, some are NaN or Inf")
        elif "." in key and not _is_whole(value):
            raise ConfigError(f"{key!r}: expected a floating tensor, got {_kind(value)}")
        elif not _is_whole(value):
            raise ConfigError(f"{key!r}: expected a whole number, got {_kind(value)}")


def misfit(key: str, value: object, numel: int) -> str:
    """Why a value is not a residual of this length; empty if it is one."""
    if isinstance(value, Tensor) and value.numel() == numel:
        return ""
    return (
        f"{key!r}: expected {numel} values, got {_kind(value)}; it was made for another codec or "
        "another shape"
    )


def _is_whole(value: object) -> bool:
    if isinstance(value, Tensor):
        plain = not value.is_floating_point() and not value.is_complex()
        return plain and value.numel() == 1 and value.dtype is not torch.bool
    return type(value) is int


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of {math.prod(value.shape)} elements"
    return repr(value)
