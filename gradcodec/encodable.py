"""What can be encoded: which tensors, under which names, and how much of it.

The Python API, the wire format and codec folders all use these checks. An error names the tensor
that does not fit and says what to pass instead.
"""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from gradcodec.errors import UpdateError

#: dtype <-> wire code. Literal numbers, never reused.
DTYPE_CODES: dict[torch.dtype, int] = {
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.float64: 4,
    torch.int8: 5,
    torch.uint8: 6,
    torch.int16: 7,
    torch.int32: 8,
    torch.int64: 9,
    torch.bool: 10,
}

MAX_TENSORS: Final = 1 << 20
MAX_NAME_BYTES: Final = 1 << 12
MAX_DIMS: Final = 16
MAX_NUMEL: Final = 1 << 48


def check_update(update: Any, *, values: bool = True) -> None:
    """Raise ``UpdateError`` unless ``update`` maps names to plain tensors.

    Args:
        update: what a caller handed over as an update.
        values: whether values are needed; if not, meta tensors are accepted too.
    """
    if not isinstance(update, Mapping) and not hasattr(update, "keys"):
        raise UpdateError(
            f"expected tensors by name, got {_a(update)}; pass {_mapping_instead(update)} instead"
        )
    for name, tensor in update.items():
        check_name(name)
        check_tensor(name, tensor, values=values)


def check_name(name: Any) -> None:
    """Raise ``UpdateError`` unless a tensor can have this name: text that UTF-8 can write."""
    if not isinstance(name, str):
        raise UpdateError(f"expected tensor names that are text, got {shown(name)}")
    try:
        length = len(name) if name.isascii() else len(name.encode())
    except UnicodeEncodeError as err:
        raise UpdateError(
            f"tensor name {shown(name)} is not text: character {err.start} is half of a pair"
        ) from err
    if length > MAX_NAME_BYTES:
        raise UpdateError(
            f"tensor name {shown(name)}: expected at most {MAX_NAME_BYTES} bytes, got {length}"
        )


def check_tensor(name: str, tensor: Any, *, values: bool = True) -> None:
    """Raise ``UpdateError`` unless this is a plain dense tensor of a dtype with a wire code.

    Any strides, ``requires_grad`` and any device that has values are accepted. A DTensor, one
    rank's part of a tensor, is not.
    """
    found = _obstacle(tensor, values)
    if found is not None:
        came, instead = found
        raise UpdateError(
            f"{shown(name)}: expected a plain dense tensor, got {came}; pass {instead} instead"
        )
    check_dtype(name, tensor.dtype)


def check_dtype(name: str, dtype: Any) -> None:
    """Raise ``UpdateError`` unless ``dtype`` has a wire code."""
    if dtype in DTYPE_CODES:
        return
    known = [str(d).removeprefix("torch.") for d in DTYPE_CODES]
    raise UpdateError(
        f"{shown(name)} has dtype {dtype}; expected one of {known}"
        + (f"; pass {_dtype_instead(dtype)} instead" if isinstance(dtype, torch.dtype) else "")
    )


def shown(value: Any, limit: int = 60) -> str:
    """``repr``, cut to about ``limit`` characters: a stranger's value may be long or deep."""
    try:
        short = isinstance(value, str | bytes)
        text = repr(value[:limit]) if short else reprlib.repr(value)
    except ValueError:  # Python refuses to write integers of more than 4,300 digits
        return f"a {type(value).__name__} of very many digits"
    cut = len(text) > limit + 4 or (short and len(value) > limit)
    return text[:limit] + "..." if cut else text


def _obstacle(tensor: Any, values: bool) -> tuple[str, str] | None:
    """Why ``tensor`` cannot be encoded, and what to pass instead; ``None`` if it can be."""
    if not isinstance(tensor, Tensor):
        if type(tensor).__module__.partition(".")[0] == "numpy":
            return _a(tensor), "torch.from_numpy(array)"
        return _a(tensor), "a torch.Tensor, for numbers torch.tensor(values)"
    if nn.parameter.is_lazy(tensor):
        return "an uninitialised parameter", "the module's after its first forward pass"
    # Not imported, which takes a second: there is no DTensor before someone else imports it.
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        return "a DTensor, one rank's part", "tensor.full_tensor(), which gathers it on every rank"
    if tensor.is_nested:
        return "a nested tensor", "its parts, tensor.unbind(), under names of their own"
    if tensor.layout is not torch.strided:
        return f"layout {tensor.layout}", "tensor.to_dense()"
    if tensor.is_quantized:
        return "a quantised tensor", "tensor.dequantize()"
    if tensor.is_complex():
        return f"{tensor.dtype}", "torch.view_as_real(tensor)"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "a tensor inside a torch.func transform", "what the transform returns"
    # A subclass with its own __torch_dispatch__ has no bytes itself: fake tensors, wrappers.
    answers = getattr(type(tensor), "__torch_dispatch__", None)
    if answers is not torch._C._disabled_torch_dispatch_impl:
        return _a(tensor), "the plain torch.Tensor that it stands for"
    if values and tensor.is_meta:
        return "a meta tensor, which has no values", "a tensor on a device that has them"
    return None


def _mapping_instead(update: Any) -> str:
    if isinstance(update, nn.Module):
        return "dict(module.named_parameters()) or module.state_dict()"
    if isinstance(update, Tensor):
        return "{name: tensor}"
    return "a dict such as dict(module.named_parameters())"


def _dtype_instead(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "torch.view_as_real(tensor)"
    return "tensor.float()" if dtype.is_floating_point else "tensor.to(torch.int64)"


def _a(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
