"""What ranks must have in common, as texts: codecs, routes, tensors, bases.

Equal texts stand for equal messages and equal results. What only one rank is concerned with, such
as how often it logs or measures, is in none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gradcodec.codecs.base import Codec
from gradcodec.codecs.registry import UNTRAINED, make_codec
from gradcodec.distributed.coding import CodecCoder
from gradcodec.distributed.lowrank import Follower, LowRank
from gradcodec.distributed.plan import Choice, Policy
from gradcodec.distributed.routes import Projection, Route, named_codec
from gradcodec.wire import tensor_digest


def choice_text(choice: Choice) -> str:
    """A codec's name, or its settings and digest, which covers its weights; low rank's settings."""
    if choice == "lowrank":
        choice = LowRank()
    if isinstance(choice, LowRank):
        return repr(choice)
    codec = named_codec(choice)
    name = _names().get(codec.digest)
    return name or f"{codec!r} of digest {codec.digest.hex()}"


@lru_cache
def _names() -> dict[bytes, str]:
    return {make_codec(name).digest: name for name in UNTRAINED}


def rules_text(rules: Iterable[tuple[str, Choice]]) -> str:
    """Patterns and what they choose, in their order."""
    return ", ".join(f"{pattern!r}: {choice_text(choice)}" for pattern, choice in rules)


def tensor_text(tensor: Tensor) -> str:
    """Dtype, shape and layout."""
    layout = "" if tensor.layout is torch.strided else f" {tensor.layout}"
    return f"{_dtype(tensor)}{list(tensor.shape)}{layout}"


def parameter_terms(
    parameters: Mapping[str, Tensor], policy: Policy, feedback: bool | None
) -> dict[str, str]:
    """Every parameter in its place: name, dtype, shape, and how it travels.

    Args:
        parameters: in their order.
        policy: their routes.
        feedback: ``True``, ``False`` or ``None`` for what each route asks for.
    """
    digests: dict[int, str] = {}
    return {
        f"parameter {i}": f"{name}: {tensor_text(p)}, "
        + _way(policy.routes[name], policy.lowrank.get(name), feedback, digests)
        for i, (name, p) in enumerate(parameters.items())
    }


def follower_terms(followers: Mapping[str, Follower], names: Sequence[str]) -> dict[str, str]:
    """Bases and start vectors of low-rank parameters: what the next exchange is made with."""
    found = {}
    for name in names:
        if (follower := followers.get(name)) is not None:
            found[f"basis of {name}"] = _values(follower.basis)
            found[f"start vectors of {name}"] = _values(follower.start)
    return found


def _way(
    route: Route, lowrank: LowRank | None, feedback: bool | None, digests: dict[int, str]
) -> str:
    parts = [] if lowrank is None else [repr(lowrank)]
    if route.projection is not None:
        parts.append(_projected(route.projection, digests))
    if route.coder is None:
        return ", ".join([*parts, "sent as it is"])
    if isinstance(route.coder, CodecCoder):
        parts.append(choice_text(route.coder.codec))
    if route.feedback if feedback is None else feedback:
        parts.append("with error feedback")
    return ", ".join(parts)


def _projected(projection: Projection, digests: dict[int, str]) -> str:
    basis, axis = projection.basis, projection.axis
    if id(basis) not in digests:  # parameters may share one
        digests[id(basis)] = _values(basis)
    side = "left" if axis.left else "right"
    return f"projected from the {side} on {digests[id(basis)]}"


def _values(tensor: Tensor | None) -> str:
    if tensor is None:
        return "none"
    return f"{tensor_text(tensor)} of digest {tensor_digest(tensor.detach().cpu())[:16]}"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def codec_text(codec: Codec, feedback: bool) -> str:
    """The codec of a unit of a sharded model."""
    return choice_text(codec) + (", with error feedback" if feedback else "")
