"""The bytes of wire version 1, frozen: see golden/README.md."""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradcodec import wire
from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, Cast, Identity, RotatedSign, Subspace, TopK
from gradcodec.encodable import DTYPE_CODES
from gradcodec.errors import (
    BadFlagsError,
    BadMagicError,
    ChecksumError,
    CodecMismatchError,
    LimitError,
    MalformedBodyError,
    MalformedSpecError,
    TrailingBytesError,
    TruncatedError,
    UnexpectedReplyError,
    UnknownCodecError,
    UnsupportedVersionError,
    WireError,
)
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.packers.cast import CastConfig
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.packers.topk import TopKConfig
from gradcodec.per_tensor import PerTensor
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import Update, UpdateSpec
from gradcodec.wire import CODEC_IDS, Payload

GOLDEN = Path(__file__).parent / "golden"
WRITE = os.environ.get("GRADCODEC_WRITE_GOLDEN") == "1"
if WRITE and os.environ.get("CI"):
    raise RuntimeError("GRADCODEC_WRITE_GOLDEN is refused under CI: golden files are reviewed")

SPECIAL_FP32 = (0x7F800000, -0x800000, 0x7FC00001, -0x80000000, 1, 0x7F7FFFFF)
"""+Inf, -Inf, a NaN with a payload, -0, the smallest subnormal, the largest finite value."""


def ramp(count: int) -> Tensor:
    """``count`` different magnitudes of mixed sign and uneven order, whole numbers in fp32."""
    size = torch.arange(count, dtype=torch.int64) * 7 % 31 + 31 * (torch.arange(count) // 31) + 1
    return torch.where(torch.arange(count) % 3 == 1, -size, size).float()


def mixed() -> dict[str, Tensor]:
    """A matrix, a vector of odd length, a scalar, an empty tensor and an all-zero one."""
    return {
        "matrix": ramp(60).view(5, 12),
        "vector": ramp(33),
        "scalar": torch.tensor(-3.0),
        "empty": torch.zeros(0, 4),
        "zeros": torch.zeros(8),
        "half": ramp(5).half(),
    }


def every_dtype() -> dict[str, Tensor]:
    """One tensor per dtype of the wire, with a name outside ASCII."""
    out = {str(d).removeprefix("torch."): torch.arange(6).to(d).view(2, 3) for d in DTYPE_CODES}
    out["spécial/值"] = torch.tensor(SPECIAL_FP32, dtype=torch.int32).view(torch.float32)
    return out


def identity() -> tuple[Codec, Update]:
    return Identity(), every_dtype()


def identity_bound() -> tuple[Codec, Update]:
    update = mixed()
    return Identity().bind(UpdateSpec.of(update), base=bytes(range(8))), update


def cast(dtype: str) -> tuple[Codec, Update]:
    # 2049 is a tie in fp16, 257 in bf16; 70000 is beyond fp16.
    ties = torch.tensor([2049, 2051, 257, 259, 70000, -1])
    return Cast(CastConfig(dtype)), {
        "fp32": ties.float(),
        "fp64": ties.double(),
        "special": torch.tensor(SPECIAL_FP32[:4], dtype=torch.int32).view(torch.float32),
        "int64": ties,
        "bf16": ramp(3).bfloat16(),
    }


def blockquant(bits: int) -> tuple[Codec, Update]:
    return BlockQuant(BlockQuantConfig(bits, block=16)), mixed()


def topk() -> tuple[Codec, Update]:
    # Chunks of 24 take 5 index bits, which straddle bytes; the last chunk is short.
    return TopK(TopKConfig(k=4, chunk=24, bits=8)), {"matrix": ramp(60).view(5, 12)}


def blockquant_rotated() -> tuple[Codec, Update]:
    # Whole numbers with few bits: all sums of the rotation are exact, so is its division by 64.
    update = {"matrix": (ramp(60) - 20).view(5, 12), "vector": ramp(4099) % 1021 - 510}
    return BlockQuant(BlockQuantConfig(4, 4096, rotate=True)), update


def blockquant_gaussian() -> tuple[Codec, Update]:
    config = BlockQuantConfig(4, 64, rotate=True, levels="gaussian")
    return BlockQuant(config), blockquant_rotated()[1]


def blockquant_stochastic() -> tuple[Codec, Update]:
    # The dither is integers; a product and a sum of fp32 follow, which every machine rounds alike.
    return BlockQuant(BlockQuantConfig(2, 16, "absmax", stochastic=True)), mixed()


def blockquant_rotated_stochastic() -> tuple[Codec, Update]:
    codec, update = BlockQuantConfig(4, 4096, rotate=True, stochastic=True), blockquant_rotated()[1]
    return BlockQuant(codec), update


def topk_rows() -> tuple[Codec, Update]:
    # Magnitudes that differ by more than 2^-17; the last row of 64 is short.
    codec = TopK(TopKConfig(k=2, chunk=64, bits=4, structure="rows"))
    return codec, {"matrix": ramp(200).view(5, 40)}


def topk_elias_fano() -> tuple[Codec, Update]:
    codec = TopK(TopKConfig(k=4, chunk=24, bits=8, index="elias-fano"))
    return codec, {"matrix": ramp(60).view(5, 12)}


def topk_bitmap() -> tuple[Codec, Update]:
    codec = TopK(TopKConfig(k=10, chunk=24, bits=8, index="bitmap"))
    return codec, {"matrix": ramp(60).view(5, 12)}


def rotsign() -> tuple[Codec, Update]:
    # Blocks of 16 by powers of two: every sum is exact, on every device and in every order.
    values = 2.0 ** (torch.arange(40) % 5) * (1 - 2.0 * (torch.arange(40) % 3 == 0))
    return RotatedSign(RotatedSignConfig(block=16, kept=8)), {"matrix": values.view(5, 8)}


def rotsign_largest() -> tuple[Codec, Update]:
    return RotatedSign(RotatedSignConfig(block=16, kept=3, which="largest")), rotsign()[1]


def rotsign_largest_many() -> tuple[Codec, Update]:
    return RotatedSign(RotatedSignConfig(block=16, kept=9, which="largest")), rotsign()[1]


def chain() -> tuple[Codec, Update]:
    update = {
        "left": ramp(24).view(4, 6),
        "bias": ramp(3),
        "right": ramp(32).view(4, 8),
    }
    spec = UpdateSpec.of(update)
    pairs = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 1.0], [0.0, 0.25]])
    bases = {
        "left": (Axis(left=True, size=4, other=6), pairs),
        "right": (Axis(left=False, size=8, other=4), torch.cat([pairs, -pairs])),
    }
    subspace = Subspace.from_bases(SubspaceConfig(ratio=2.0), spec, bases)
    return Chain(subspace, BlockQuant(BlockQuantConfig(4, block=8))), update


def per_tensor() -> tuple[Codec, Update]:
    update = {"matrix": ramp(60).view(5, 12), "bias": ramp(5), "scale": torch.tensor(-3.0)}
    codecs = BlockQuant(BlockQuantConfig(4, block=16)), Identity()
    groups = [(codecs[0], ["matrix", "scale"]), (codecs[1], ["bias"])]
    return PerTensor.of(UpdateSpec.of(update), groups), update


CASES: dict[str, Callable[[], tuple[Codec, Update]]] = {
    "identity": identity,
    "identity-bound-base": identity_bound,
    "cast-float16": lambda: cast("float16"),
    "cast-bfloat16": lambda: cast("bfloat16"),
    "blockquant-8": lambda: blockquant(8),
    "blockquant-4": lambda: blockquant(4),
    "blockquant-2": lambda: blockquant(2),
    "blockquant-1": lambda: blockquant(1),
    "blockquant-rotated-4": blockquant_rotated,
    "blockquant-rotated-gaussian-4": blockquant_gaussian,
    "blockquant-stochastic-2": blockquant_stochastic,
    "blockquant-rotated-stochastic-4": blockquant_rotated_stochastic,
    "topk": topk,
    "topk-rows": topk_rows,
    "topk-elias-fano": topk_elias_fano,
    "topk-bitmap": topk_bitmap,
    "rotsign": rotsign,
    "rotsign-largest": rotsign_largest,
    "rotsign-largest-many": rotsign_largest_many,
    "chain-subspace-blockquant-4": chain,
    "per-tensor": per_tensor,
}


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, NaN payloads and the sign of zero included."""
    return a.dtype == b.dtype and a.shape == b.shape and wire.raw_bytes(a) == wire.raw_bytes(b)


@pytest.mark.parametrize("name", CASES)
def test_input_gives_these_bytes(name: str) -> None:
    codec, update = CASES[name]()
    blob = codec.encoder.encode(update).to_bytes()
    path = GOLDEN / f"{name}.bin"
    if WRITE:
        path.write_bytes(blob)
        decoded = codec.decoder.decode(Payload.from_bytes(blob))
        save_file(decoded, GOLDEN / f"{name}.safetensors")
    assert blob == path.read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_these_bytes_give_these_tensors(name: str) -> None:
    codec, update = CASES[name]()
    decoded = codec.decoder.decode(Payload.from_bytes((GOLDEN / f"{name}.bin").read_bytes()))
    expected = load_file(GOLDEN / f"{name}.safetensors")
    assert list(decoded) == list(update)
    assert set(expected) == set(update)
    assert [n for n in decoded if not same(decoded[n], expected[n])] == []


@pytest.mark.parametrize("name", ["identity", "identity-bound-base"])
def test_identity_files_hold_the_input_itself(name: str) -> None:
    _, update = CASES[name]()
    expected = load_file(GOLDEN / f"{name}.safetensors")
    assert [n for n in update if not same(update[n], expected[n])] == []


def test_files_and_cases_are_the_same() -> None:
    assert {p.stem for p in GOLDEN.glob("*.bin")} == set(CASES)
    assert {p.stem for p in GOLDEN.glob("*.safetensors")} == set(CASES)


# -- malformed files ---------------------------------------------------------------------------


def sealed(head: bytes) -> bytes:
    """Bytes with the CRC-32 that belongs to them."""
    return head + zlib.crc32(head).to_bytes(4, "little")


def good() -> bytes:
    """An identity payload of one fp32 tensor."""
    return Identity().encoder.encode({"w": torch.ones(2)}).to_bytes()


def with_table(table: bytes) -> bytes:
    """An identity payload with an empty body and this tensor table."""
    return sealed(good()[:13] + bytes([len(table)]) + table + b"\0")


def patched(at: int, value: int) -> bytes:
    blob = bytearray(good())
    blob[at] = value
    return bytes(blob)


BAD: dict[type[WireError], Callable[[], bytes]] = {
    TruncatedError: lambda: good()[:-5],
    BadMagicError: lambda: patched(0, ord("g")),
    UnsupportedVersionError: lambda: patched(2, 2),
    UnknownCodecError: lambda: patched(3, 0xEE),
    BadFlagsError: lambda: patched(4, 0x81),
    # One flipped bit inside the body.
    ChecksumError: lambda: patched(-6, good()[-6] ^ 1),
    # A body length of zero in two bytes.
    LimitError: lambda: sealed(good()[:4] + b"\0" + good()[5:13] + b"\x80\0"),
    TrailingBytesError: lambda: good() + b"\0",
    # One tensor "w" of dtype code 0.
    MalformedSpecError: lambda: with_table(b"\1\1w\0\0"),
    # One fp32 scalar, and no bytes for it.
    MalformedBodyError: lambda: with_table(b"\1\1w\1\0"),
    # Read below by the identity codec.
    CodecMismatchError: lambda: Cast().encoder.encode({"w": torch.ones(2)}).to_bytes(),
}


def leaves(cls: type[WireError]) -> set[type[WireError]]:
    """All subclasses, at any depth."""
    direct = set(cls.__subclasses__())
    return direct.union(*(leaves(c) for c in direct))


@pytest.mark.parametrize("error", BAD, ids=lambda e: e.__name__)
def test_malformed_files_raise_the_error_they_are_named_after(error: type[WireError]) -> None:
    path = GOLDEN / "bad" / f"{error.__name__}.bin"
    if WRITE:
        path.write_bytes(BAD[error]())
    with pytest.raises(WireError) as caught:
        Identity().decoder.decode(Payload.from_bytes(path.read_bytes()))
    assert type(caught.value) is error


def test_every_wire_error_has_its_malformed_file() -> None:
    # Well-formed replies that come at the wrong time have no bytes to show.
    assert leaves(WireError) - {UnexpectedReplyError} == set(BAD)
    assert {p.stem for p in (GOLDEN / "bad").glob("*.bin")} == {e.__name__ for e in BAD}


def test_every_codec_whose_bytes_are_integer_made_has_a_file() -> None:
    frozen = {CASES[name]()[0].config.kind for name in CASES}
    # A subspace alone is float arithmetic on fp32 codes; an autoencoder is a float network.
    assert set(CODEC_IDS) - frozen == {"subspace", "autoencoder"}
