"""The codecs that are compared, ours and others', behind two functions and a number of bytes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from benchmarks.codecs.data import Snapshot, flat
from benchmarks.peers.ddp.checkout import EPFML
from benchmarks.peers.optional import bitsandbytes_functional
from gradcodec import ops
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, TopK
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.packers.topk import TopKConfig
from gradcodec.registry import make_codec


@dataclass(frozen=True)
class Coder:
    """One codec at work on vectors of one kind of snapshot.

    Attributes:
        encode: snapshot -> what is sent, as it is in memory.
        decode: inverse, fp32 ``[n]``.
        nbytes: bytes of what is sent, without headers.
    """

    encode: Callable[[Snapshot], Any]
    decode: Callable[[Any], Tensor]
    nbytes: Callable[[Any], int]


@dataclass(frozen=True)
class Scheme:
    """A row of the tables.

    Attributes:
        name: shown.
        kind: ``"ours"`` or ``"peer"``.
        package: of a peer, for its version.
        make: a coder for snapshots like this one; ``ImportError`` says what is not installed.
        feedback: it remembers what it lost; its cost is another, its error as without.
    """

    name: str
    kind: str
    package: str
    make: Callable[[Snapshot], Coder]
    feedback: bool = False

    @property
    def version(self) -> str:
        """Of the peer's package."""
        if self.package == EPFML.folder:
            return EPFML.commit
        try:
            return metadata.version(self.package)
        except metadata.PackageNotFoundError:
            return ""


# -- ours ----------------------------------------------------------------------------------------


def _ours(name: str, make: Callable[[], Codec], *, feedback: bool = False) -> Scheme:
    def coder(example: Snapshot) -> Coder:
        codec, numel = make(), sum(t.numel() for t in example.values())
        residual = torch.zeros(codec.packer.residual_numel(numel)) if feedback else None
        return Coder(
            lambda s: codec.packer.pack(_vector(s), seed=1, residual=residual),
            lambda body: codec.packer.unpack(body, numel),
            lambda body: len(body),
        )

    return Scheme(name, "ours", "gradcodec", coder, feedback)


def _vector(snapshot: Snapshot) -> Tensor:
    """A single vector as it is, without a copy that would be timed."""
    first = next(iter(snapshot.values()))
    return first.reshape(-1) if len(snapshot) == 1 else flat(snapshot)


def _block(name: str, *settings: Any, feedback: bool = False, **more: Any) -> Scheme:
    config = BlockQuantConfig(*settings, **more)
    return _ours(name, lambda: BlockQuant(config), feedback=feedback)


def _topk(name: str, **settings: Any) -> Scheme:
    config = TopKConfig(**settings)
    return _ours(name, lambda: TopK(config))


_NAMED = (
    *("int8", "int8-rotated", "int8-unbiased", "int4", "int4-rotated", "int4-unbiased"),
    *(
        "gauss4",
        "gauss4-64",
        "int2",
        "int2-rotated",
        "int2-unbiased",
        "sign",
        "sign-rotated",
        "rotsign",
        "rotsign-quarter",
        "rotsign-eighth",
    ),
)

OURS: tuple[Scheme, ...] = (
    *(_ours(name, functools.partial(make_codec, name)) for name in _NAMED),
    _block("int8 of 4096", 8, 4096),
    _block("int8 of 32", 8, 32),
    _block("int8 dithered", 8, stochastic=True),
    _block("int4 of 4096", 4, 4096),
    _block("int4 of 32", 4, 32),
    _block("gauss4 of 32", 4, 32, rotate=True, levels="gaussian"),
    _block("int4 dithered", 4, stochastic=True),
    _block("int4-rotated, EF", 4, 4096, scale="rms", rotate=True, feedback=True),
    _block("int4-unbiased, EF", 4, 4096, rotate=True, stochastic=True, feedback=True),
    _block("int2 rms of 64", 2, 64, scale="rms"),
    _block("sign of 64", 1, 64),
    _topk("topk 64 of 4096, 8 bit"),
    _topk("topk 64 of 4096, 8 bit, elias-fano", index="elias-fano"),
    _topk("topk 64 of 4096, 4 bit, elias-fano", bits=4, index="elias-fano"),
    _topk("topk 64 of 4096, 2 bit, elias-fano", bits=2, index="elias-fano"),
    _topk("topk 256 of 4096, 4 bit, elias-fano", k=256, bits=4, index="elias-fano"),
    _topk("topk 16 of 4096, 2 bit, elias-fano", k=16, bits=2, index="elias-fano"),
    _topk("rows 1 of 64, 4 bit", k=1, chunk=64, bits=4, structure="rows"),
    _topk("rows 2 of 64, 4 bit", k=2, chunk=64, bits=4, structure="rows"),
)

#: Timed as torch computes them, beside what the machine has.
BY_TORCH = ("int8", "int4", "int4 dithered", "int4-rotated", "int4-unbiased", "gauss4", "sign")
BY_TORCH += ("topk 64 of 4096, 8 bit", "rows 1 of 64, 4 bit")


@contextmanager
def computed_by(impl: str) -> Iterator[None]:
    """Let every op that a codec calls be computed by an implementation, named explicitly."""
    names = ("encode", "decode_mean", "topk_encode", "top_rows", "sparse_mean")
    kept = {name: getattr(ops, name) for name in names}
    try:
        for name, function in kept.items():
            setattr(ops, name, functools.partial(function, impl=impl))
        yield
    finally:
        for name, function in kept.items():
            setattr(ops, name, function)


# -- peers ---------------------------------------------------------------------------------------


def _piquant(dtype: torch.dtype, bits: int, mode: str) -> Callable[[Snapshot], Coder]:
    def make(example: Snapshot) -> Coder:
        try:
            import piquant
            from piquant import torch as functions
        except ImportError as err:
            raise ImportError("pip install pypiquant") from err
        # Its outputs are of torch's quantised dtypes, which are to go away.
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        context, numel = piquant.Context(1), sum(t.numel() for t in example.values())

        def encode(snapshot: Snapshot) -> tuple[Tensor, float, int]:
            x = _vector(snapshot)
            scale, zero = functions.compute_quant_params(x, dtype=dtype, ctx=context)
            given = {"scale": scale, "zero_point": zero, "dtype": dtype}
            return functions.quantize(x, **given, round_mode=mode, ctx=context), scale, zero

        def decode(coded: tuple[Tensor, float, int]) -> Tensor:
            y: Tensor = functions.dequantize(
                coded[0], scale=coded[1], zero_point=coded[2], dtype=torch.float32, ctx=context
            )
            return y

        # One scale (fp32) and one zero point (int64) for the whole.
        return Coder(encode, decode, lambda coded: -(-numel * bits // 8) + 12)

    return make


def _bitsandbytes(kind: str, block: int) -> Callable[[Snapshot], Coder]:
    def make(example: Snapshot) -> Coder:
        functions = bitsandbytes_functional()

        def encode(snapshot: Snapshot) -> tuple[Tensor, Any]:
            x = _vector(snapshot)
            if kind == "8bit":
                coded: tuple[Tensor, Any] = functions.quantize_blockwise(x, blocksize=block)
            else:
                coded = functions.quantize_4bit(x, blocksize=block, quant_type=kind)
            return coded

        def decode(coded: tuple[Tensor, Any]) -> Tensor:
            if kind == "8bit":
                y = functions.dequantize_blockwise(coded[0], coded[1], blocksize=block)
            else:
                y = functions.dequantize_4bit(coded[0], coded[1], quant_type=kind)
            return y.reshape(-1)

        # Codes and fp32 maxima; the table of levels is a constant.
        return Coder(encode, decode, lambda c: c[0].numel() + 4 * c[1].absmax.numel())

    return make


def _adaquant(example: Snapshot) -> Coder:
    try:
        from nvflare.app_opt.pt.quantization.ada_quant import AdaQuantizer
    except ImportError as err:
        raise ImportError("pip install 'gradcodec[nvflare]'") from err
    quantizer = AdaQuantizer()

    def encode(snapshot: Snapshot) -> list[tuple[Any, dict[str, Any]]]:
        return [quantizer.quantize(t) for t in snapshot.values()]  # tensor by tensor, as it is used

    def decode(coded: list[tuple[Any, dict[str, Any]]]) -> Tensor:
        whole = [
            quantizer.dequantized(torch.as_tensor(values), state) if state else values
            for values, state in coded
        ]
        return torch.cat([t.reshape(-1).float() for t in whole])

    def nbytes(coded: list[tuple[Any, dict[str, Any]]]) -> int:
        # The values, and the offset, the norm and the number of levels.
        return sum(state.get("compressed_tensor", values).nbytes + 24 for values, state in coded)

    return Coder(encode, decode, nbytes)


def _torch_topk(share: float) -> Callable[[Snapshot], Coder]:
    def make(example: Snapshot) -> Coder:
        numel = sum(t.numel() for t in example.values())
        k = max(1, int(numel * share))

        def encode(snapshot: Snapshot) -> tuple[Tensor, Tensor]:
            x = _vector(snapshot)
            index = x.abs().topk(k, sorted=False).indices
            return x[index], index.to(torch.int32)

        def decode(coded: tuple[Tensor, Tensor]) -> Tensor:
            return torch.zeros(numel).index_copy_(0, coded[1].long(), coded[0])

        return Coder(encode, decode, lambda coded: 8 * len(coded[0]))

    return make


def _powersgd(rank: int) -> Callable[[Snapshot], Coder]:
    def make(example: Snapshot) -> Coder:
        theirs = EPFML.module("powersgd.powersgd")
        like = [torch.nn.Parameter(_matrix(t)) for t in example.values()]
        config = theirs.Config(rank=rank, start_compressing_after_num_steps=0)
        aggregator = theirs.PowerSGD(like, config)

        def encode(snapshot: Snapshot) -> list[Tensor]:
            # Both products, alone in the world; they leave the error where the gradient was. What
            # is timed includes the copies that keep ours.
            averages: list[Tensor] = aggregator.aggregate(
                [_matrix(t).clone() for t in snapshot.values()]
            )
            return averages

        def nbytes(averages: list[Tensor]) -> int:
            pairs = zip(averages, aggregator.is_compressed_mask, strict=True)
            return sum(
                4 * (rank * (len(t) + t.numel() // len(t)) if low else t.numel())
                for t, low in pairs
            )

        return Coder(encode, lambda a: torch.cat([t.reshape(-1) for t in a]), nbytes)

    return make


def _matrix(tensor: Tensor) -> Tensor:
    """A long vector as a square matrix, so that a low rank of it means something."""
    side = int(tensor.numel() ** 0.5)
    if tensor.dim() < 2 and side * side == tensor.numel() and side > 1000:
        return tensor.reshape(side, side)
    return tensor


PEERS: tuple[Scheme, ...] = (
    *(
        Scheme(f"piquant {bits} bit{kind}", "peer", "pypiquant", _piquant(dtype, bits, mode))
        for dtype, bits in ((torch.quint8, 8), (torch.quint4x2, 4), (torch.quint2x4, 2))
        for kind, mode in (("", "nearest"), (" stochastic", "stochastic"))
    ),
    Scheme("bitsandbytes 8 bit of 256", "peer", "bitsandbytes", _bitsandbytes("8bit", 256)),
    Scheme("bitsandbytes 8 bit of 4096", "peer", "bitsandbytes", _bitsandbytes("8bit", 4096)),
    Scheme("bitsandbytes nf4 of 64", "peer", "bitsandbytes", _bitsandbytes("nf4", 64)),
    Scheme("bitsandbytes fp4 of 64", "peer", "bitsandbytes", _bitsandbytes("fp4", 64)),
    Scheme("AdaQuant", "peer", "nvflare", _adaquant),
    Scheme("torch.topk 1 %", "peer", "torch", _torch_topk(0.01)),
    Scheme("PowerSGD rank 1", "peer", EPFML.folder, _powersgd(1)),
    Scheme("PowerSGD rank 4", "peer", EPFML.folder, _powersgd(4)),
)

SCHEMES: Mapping[str, Scheme] = MappingProxyType({s.name: s for s in (*OURS, *PEERS)})
