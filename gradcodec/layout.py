"""Named tensors <-> the vectors and matrices that codecs work on. No codec knows a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradcodec.errors import MalformedBodyError, NonFiniteError, UpdateError
from gradcodec.types import TensorSpec, Update, UpdateSpec


def flatten(update: Update, spec: UpdateSpec) -> Tensor:
    """All values as one fp32 vector ``[spec.numel]``, tensors in spec order, row-major.

    Raises:
        UpdateError: a tensor is not of a floating dtype.
    """
    check_floating(spec)
    return flatten_any({t.name: update[t.name].detach() for t in spec}, spec)


def flatten_any(update: Update, spec: UpdateSpec) -> Tensor:
    """``flatten`` without its checks; differentiable in ``update``."""
    parts = [update[t.name].reshape(-1).float() for t in spec]
    return torch.cat(parts) if parts else torch.empty(0)


def unflatten(vector: Tensor, spec: UpdateSpec) -> dict[str, Tensor]:
    """Inverse of ``flatten``: ``[spec.numel]`` -> tensors of the spec's shapes and dtypes.

    Differentiable in ``vector``.

    Raises:
        UpdateError: the number of elements is wrong, or a tensor is not of a floating dtype.
    """
    check_floating(spec)
    if vector.numel() != spec.numel:
        raise UpdateError(f"expected a vector of {spec.numel} elements, got {vector.numel()}")
    parts = torch.split(vector, [t.numel for t in spec])
    return {t.name: narrow(p.reshape(t.shape), t.dtype) for t, p in zip(spec, parts, strict=True)}


def narrow(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to a floating dtype; finite values beyond its range become its largest, not Inf.

    A quantiser may round the largest fp16 value up; that must not turn into an infinity.
    """
    if dtype.itemsize < values.dtype.itemsize:
        top = torch.finfo(dtype).max
        values = values.clamp(-top, top)
    return values.to(dtype)


def matrix_shape(spec: TensorSpec) -> tuple[int, int]:
    """The 2-D view of a tensor: vectors are columns ``[n, 1]``, later axes are folded together."""
    if len(spec.shape) < 2:
        return spec.numel, 1
    return spec.shape[0], math.prod(spec.shape[1:])


def check_floating(spec: UpdateSpec) -> None:
    """Raise ``UpdateError`` if a tensor is not of a floating dtype, so has no code and no mean."""
    for t in spec:
        if not t.dtype.is_floating_point:
            raise UpdateError(
                f"{t}: only floating tensors have a code or a mean; encode the others apart, with "
                "make_codec('fp32'), which keeps every bit of any dtype"
            )


def check_finite(vector: Tensor, what: str, room: float = 1.0) -> None:
    """Raise ``NonFiniteError`` if ``vector`` holds NaN or Inf, saying how many.

    With ``room`` also if a value times ``room`` is beyond fp32, for coders that compute with sums.
    """
    if not vector.numel() or not vector.is_floating_point():
        return
    # If there is a NaN, aminmax returns it; unlike a mask this takes no memory.
    ends = torch.stack(torch.aminmax(vector.detach()))
    if not bool(_is_finite(ends, room).all()):
        bad = int((~_is_finite(vector, room)).sum())
        large = "" if room == 1 else f" or beyond {torch.finfo(torch.float32).max / room:.1e}"
        raise NonFiniteError(
            f"{what}: expected finite values, {bad} of {vector.numel()} are NaN or Inf{large}"
        )


def _is_finite(vector: Tensor, room: float) -> Tensor:
    return torch.isfinite(vector if room == 1 else vector.float() * room)


def check_unpacked(vector: Tensor, what: str) -> None:
    """Raise ``MalformedBodyError`` if a body was unpacked to NaN or Inf."""
    try:
        check_finite(vector, what)
    except NonFiniteError as err:
        raise MalformedBodyError(f"no encoder makes this body: {err}") from err


def within_fp32(values: Tensor, factor: float) -> bool:
    """Whether ``factor`` times the largest of these magnitudes is an fp32 number."""
    if not values.numel():
        return True
    return float(values.float().abs().max()) * factor <= torch.finfo(torch.float32).max
