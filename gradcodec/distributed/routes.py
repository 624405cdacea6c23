"""What is done with each parameter: sent raw, coded as it is, or projected first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gradcodec.codecs.base import Codec
from gradcodec.codecs.blockquant import BlockQuant
from gradcodec.codecs.cast import Cast
from gradcodec.codecs.compose import Chain
from gradcodec.codecs.identity import Identity
from gradcodec.codecs.registry import make_codec
from gradcodec.codecs.rotsign import RotatedSign
from gradcodec.codecs.subspace import Axis, Subspace
from gradcodec.distributed.coding import CodecCoder, Coder, RawCoder
from gradcodec.distributed.lowrank import LowRank
from gradcodec.errors import ConfigError


@dataclass(frozen=True)
class Projection:
    """One parameter's part of a learned linear codec: ``z = U^T g`` or ``g V``, and back."""

    axis: Axis
    basis: Tensor

    @property
    def _shape(self) -> tuple[int, int]:
        axis = self.axis
        return (axis.size, axis.other) if axis.left else (axis.other, axis.size)

    @property
    def code_numel(self) -> int:
        """Length of a code."""
        return self.basis.shape[1] * self.axis.other

    def code(self, values: Tensor) -> Tensor:
        """Flat gradient ``[n]`` -> flat code, fp32."""
        g, u = values.reshape(self._shape).float(), self._basis_on(values)
        return (u.T @ g if self.axis.left else g @ u).reshape(-1)

    def values(self, code: Tensor) -> Tensor:
        """Flat code -> flat gradient ``[n]``, fp32."""
        u, k = self._basis_on(code), self.basis.shape[1]
        if self.axis.left:
            return (u @ code.reshape(k, -1)).reshape(-1)
        return (code.reshape(-1, k) @ u.T).reshape(-1)

    def _basis_on(self, like: Tensor) -> Tensor:
        return self.basis.to(device=like.device, dtype=torch.float32)


@dataclass(frozen=True)
class Route:
    """How one parameter travels.

    Attributes:
        coder: of the values or of their code; ``None`` sends them raw in their own dtype.
        projection: applied before coding and undone after averaging.
        feedback: whether ``error_feedback="auto"`` keeps what the coder loses.
        label: for reports.
    """

    coder: Coder | None = None
    projection: Projection | None = None
    feedback: bool = False
    label: str = "fp32"

    def coder_for(self, dtype: torch.dtype) -> Coder:
        """The coder of a tensor of this dtype."""
        return RawCoder(dtype) if self.coder is None else self.coder


RAW = Route()


def named_codec(codec: Codec | str) -> Codec:
    """A codec itself, or the one that ``make_codec`` knows under a name.

    Raises:
        ConfigError: it is neither, or a scheme that is no codec.
    """
    if isinstance(codec, Codec):
        return codec
    if isinstance(codec, LowRank) or codec == "lowrank" or str(codec).split(":")[0] == "auto":
        raise ConfigError(
            f"expected a codec or its name, such as 'int4', got {codec!r}: low rank and 'auto' are "
            "for DistributedDataParallel, as its codec=; low rank also in its rules"
        )
    if not isinstance(codec, str):
        came = f"the class {codec.__name__}" if isinstance(codec, type) else repr(codec)
        raise ConfigError(f"expected a codec object or a codec's name, such as 'int4', got {came}")
    return make_codec(codec)


def flat_route(codec: Codec, label: str | None = None) -> Route:
    """The route of a codec that codes bare vectors.

    Raises:
        ConfigError: the codec is bound to a tensor table or has learned weights.
    """
    if type(codec) is Identity:
        return RAW
    if codec.spec is not None or codec.weights:
        raise ConfigError(
            f"expected a codec that needs no tensor table, got {codec}; of the learned ones only "
            "Subspace, alone or chained with a quantiser, has codes that ranks can average"
        )
    return Route(CodecCoder(codec), None, wants_feedback(codec), label or str(codec))


def wants_feedback(codec: Codec) -> bool:
    """Whether error feedback is on under ``"auto"``.

    It needs a contractive codec (one that loses less than everything) and gains nothing where the
    expectation is right already. Casts lose less than training notices; EDEN below one bit a value
    may lose more than there was.
    """
    if isinstance(codec, Cast | Identity):
        return False
    if isinstance(codec, RotatedSign):
        return codec.config.kept == codec.config.block
    if isinstance(codec, BlockQuant) and not codec.config.contractive:
        return False
    return not getattr(codec.config, "unbiased", False)


def routes(codec: Codec | str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Route]:
    """A route for every named shape.

    A fixed-rate codec serves all alike. A ``Subspace``, alone or as the outer stage of a ``Chain``,
    must be bound to a table with these names and shapes; a parameter that it has no basis for is
    sent raw.

    Raises:
        ConfigError: the codec cannot serve these tensors.
    """
    label = codec if isinstance(codec, str) else None
    codec = named_codec(codec)
    outer = codec.outer if isinstance(codec, Chain) else codec
    if not isinstance(outer, Subspace):
        one = flat_route(codec, label)
        return dict.fromkeys(shapes, one)
    inner = flat_route(codec.inner) if isinstance(codec, Chain) else RAW
    table = {t.name: t.shape for t in outer.spec or ()}
    missing = [n for n in shapes if n not in table]
    if missing:
        raise ConfigError(
            f"subspace: fitted on {len(table)} parameters, {len(missing)} others came, for example "
            f"{missing[0]!r}; give them a rule"
        )
    bases, out = outer.bases(), {}
    for name, shape in shapes.items():
        if math.prod(table[name]) != math.prod(shape):
            raise ConfigError(f"subspace: {name!r} is {table[name]} in its table, not {shape}")
        if name not in bases:
            out[name] = RAW
            continue
        out[name] = Route(inner.coder, Projection(*bases[name]), inner.feedback, "subspace")
    return out
