"""How vectors become bytes between ranks. All that ``distributed`` knows of codecs is in this file.

``CodecCoder`` is the only user of packers. ``routes_of`` is the only function that knows which
codecs transform gradients before they pack them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from gradcodec import layout
from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, Identity, RotatedSign, Subspace
from gradcodec.distributed.lowrank import LowRank
from gradcodec.distributed.shards import ALIGN
from gradcodec.errors import ConfigError
from gradcodec.registry import UNTRAINED, make_codec, wrong_codec
from gradcodec.transforms.subspace.transform import Projection as Projection


class Coder(Protocol):
    """Bytes for flat vectors, of a size that depends on their length alone."""

    @property
    def align(self) -> int:
        """Shards start at multiples of this many elements."""
        ...

    @property
    def grain(self) -> int | None:
        """Vectors may be joined and packed together if each length is a multiple of this.

        Joining then changes no vector's code. ``None``: vectors must not be joined.
        """
        ...

    @property
    def identity(self) -> int:
        """A number that ranks compare: equal coders have equal ones."""
        ...

    def nbytes(self, numel: int) -> int:
        """Size of ``numel`` packed elements."""
        ...

    def residual_numel(self, numel: int) -> int:
        """Elements of the residual for a vector of ``numel``."""
        ...

    def pack(self, x: Tensor, seed: int, residual: Tensor | None) -> Tensor:
        """``[n]`` -> uint8 ``[nbytes(n)]``; ``NonFiniteError`` leaves the residual unchanged."""
        ...

    def mean(self, bodies: Sequence[Tensor], numel: int) -> Tensor:
        """``W`` bodies, uint8 ``[nbytes(numel)]``, -> mean in their order, fp32 ``[numel]``.

        fp64 if the values are fp64. With ``W = 1`` the result may share memory with the body.
        """
        ...

    def narrow(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A decoded mean in the dtype of the tensor it goes into."""
        ...


class RawCoder:
    """The bytes of values in ``dtype``, lossless if it is theirs; the mean is rounded once."""

    align = 1
    grain = 1

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.identity = dtype.itemsize * 2 + (dtype is torch.bfloat16)

    def nbytes(self, numel: int) -> int:
        """``itemsize`` bytes each."""
        return numel * self.dtype.itemsize

    def residual_numel(self, numel: int) -> int:
        """Nothing is lost."""
        return 0

    def pack(self, x: Tensor, seed: int, residual: Tensor | None) -> Tensor:
        """A view where ``x`` has the dtype already."""
        return x.to(self.dtype).contiguous().view(torch.uint8)

    def mean(self, bodies: Sequence[Tensor], numel: int) -> Tensor:
        """Sum in order in at least fp32, then one division."""
        wide = torch.float64 if self.dtype is torch.float64 else torch.float32
        first = bodies[0].view(self.dtype).to(wide)
        if len(bodies) == 1:
            return first
        total = first + bodies[1].view(self.dtype).to(wide)
        for body in bodies[2:]:
            total += body.view(self.dtype)
        return total.div_(len(bodies))

    def narrow(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Infinities stay what they are."""
        return x.to(dtype)


class CodecCoder:
    """A codec that needs no tensor table, on bare vectors."""

    align = ALIGN

    def __init__(self, codec: Codec) -> None:
        self.codec, self.packer = codec, codec.packer
        self.grain = self.packer.grain
        self.identity = int.from_bytes(codec.digest, "little")
        self._passes_infinities = not self.packer.finite

    def nbytes(self, numel: int) -> int:
        """The packer's exact size."""
        return self.packer.nbytes(numel)

    def residual_numel(self, numel: int) -> int:
        """The packer's size; its residual may be kept in another domain, such as rotated values."""
        return self.packer.residual_numel(numel)

    def from_residual(self, residual: Tensor, numel: int) -> Tensor:
        """``Packer.from_residual``."""
        return self.packer.from_residual(residual, numel)

    def to_residual(self, x: Tensor) -> Tensor:
        """``Packer.to_residual``."""
        return self.packer.to_residual(x)

    def pack(self, x: Tensor, seed: int, residual: Tensor | None) -> Tensor:
        """``Packer.pack``."""
        body = self.packer.pack(x, seed=seed, residual=residual)
        if residual is not None and self._passes_infinities:
            # A cast does not refuse what overflows it, and infinity minus infinity would stay.
            residual.nan_to_num_(0.0, 0.0, 0.0)
        return body

    def mean(self, bodies: Sequence[Tensor], numel: int) -> Tensor:
        """``Packer.mean``."""
        return self.packer.mean(torch.stack(list(bodies)), numel)

    def narrow(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Finite values that were rounded beyond a narrow dtype's range become its largest."""
        return x.to(dtype) if self._passes_infinities else layout.narrow(x, dtype)


@dataclass(frozen=True)
class Route:
    """The stages that one tensor passes on its way to bytes.

    Attributes:
        coder: codes the values, or their projection; ``None`` sends them in their own dtype.
        projection: applied before coding and undone after averaging.
    """

    coder: CodecCoder | None = None
    projection: Projection | None = None

    @property
    def raw(self) -> bool:
        """Whether the values travel as they are."""
        return self.coder is None and self.projection is None

    def coder_for(self, dtype: torch.dtype) -> Coder:
        """The coder of a tensor of this dtype."""
        return RawCoder(dtype) if self.coder is None else self.coder


RAW = Route()
"""Sends values as they are."""

DENSE = Identity()
"""The codec of ``RAW``."""


def named_codec(codec: object, schemes: Iterable[str] = ()) -> Codec:
    """A codec itself, or the one that ``make_codec`` knows under a name.

    Args:
        codec: what was handed over.
        schemes: names that are taken here beside those of codecs; for the error's text.

    Raises:
        ConfigError: ``codec`` is neither, or a scheme that is not a codec (low rank, ``"auto"``).
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
    if codec not in UNTRAINED:
        raise ConfigError(wrong_codec(codec, schemes))
    return make_codec(codec)


def codec_name(codec: Codec) -> str | None:
    """The name under which ``make_codec`` makes an equal codec, if there is one."""
    return _names().get(codec.digest)


@lru_cache
def _names() -> dict[bytes, str]:
    return {make_codec(name).digest: name for name in UNTRAINED}


def flat_route(codec: Codec) -> Route:
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
    return Route(CodecCoder(codec))


def routes_of(codec: Codec, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Route]:
    """A route for every named shape.

    A codec of bare vectors gives all shapes the same route. A ``Subspace``, alone or as the outer
    stage of a ``Chain``, must be bound to a table with these names and shapes; a parameter
    without a basis is sent raw.

    Raises:
        ConfigError: the codec cannot serve these tensors.
    """
    outer = codec.outer if isinstance(codec, Chain) else codec
    if not isinstance(outer, Subspace):
        return dict.fromkeys(shapes, flat_route(codec))
    inner = flat_route(codec.inner) if isinstance(codec, Chain) else RAW
    table = {t.name: t.shape for t in outer.spec or ()}
    missing = [n for n in shapes if n not in table]
    if missing:
        raise ConfigError(
            f"subspace: fitted on {len(table)} parameters, {len(missing)} others came, for example "
            f"{missing[0]!r}; give them a rule"
        )
    out = {}
    for name, shape in shapes.items():
        if math.prod(table[name]) != math.prod(shape):
            raise ConfigError(f"subspace: {name!r} is {table[name]} in its table, not {shape}")
        part = outer.transform.of(name)
        out[name] = RAW if part is None else Route(inner.coder, part)
    return out


def is_cast(codec: Codec) -> bool:
    """Whether a codec sends each value in a floating dtype: its own, or a narrower one."""
    return isinstance(codec, Identity)


def wants_feedback(codec: Codec) -> bool:
    """Whether error feedback is on under ``error_feedback="auto"``.

    Error feedback needs a contractive codec (one whose error is smaller than its input) and gains
    nothing with an unbiased one. Casts lose less than training notices. Rotated signs of fewer than
    one bit per value may have an error larger than their input.
    """
    if is_cast(codec):
        return False
    if isinstance(codec, RotatedSign):
        return codec.config.kept == codec.config.block
    if isinstance(codec, BlockQuant) and not codec.config.contractive:
        return False
    return not getattr(codec.config, "unbiased", False)
