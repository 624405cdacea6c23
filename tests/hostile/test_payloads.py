"""Payloads that a stranger made: an update or a ``WireError``, at a cost like their length.

The fuzzer is ``benchmarks/codecs/fuzz_wire.py``; ``GRADCODEC_HOSTILE=long`` runs it for longer.
"""

import json
import os
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch

from benchmarks.codecs import fuzz_wire
from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, Identity, RotatedSign, TopK
from gradcodec.encodable import MAX_TENSORS
from gradcodec.errors import CodecMismatchError, MalformedBodyError, TruncatedError, WireError
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.packers.topk import TopKConfig
from gradcodec.reference.bitpack import pack_bits
from gradcodec.registry import make_codec
from gradcodec.types import TensorSpec, UpdateSpec
from gradcodec.wire import CODEC_IDS, Payload, spec_from_bytes

COUNT = 200_000 if os.environ.get("GRADCODEC_HOSTILE") == "long" else 2_000
BOUND = UpdateSpec((TensorSpec("w", (4,)),))


def sealed(head: bytes) -> bytes:
    """Bytes with the CRC-32 that belongs to them."""
    return head + zlib.crc32(head).to_bytes(4, "little")


def with_table(codec: Codec, digest: bytes, table: bytes) -> bytes:
    """A payload of an empty body that brings this tensor table."""
    head = b"GC\1" + bytes((CODEC_IDS[codec.config.kind], 1)) + digest
    return sealed(head + fuzz_wire.varint(len(table)) + table + b"\0")


def long_table(count: int) -> bytes:
    """A tensor table of ``count`` scalars."""
    names = (b"%x" % i for i in range(count))
    return fuzz_wire.varint(count) + b"".join(bytes((len(n),)) + n + b"\1\0" for n in names)


@pytest.fixture(scope="module")
def tally() -> fuzz_wire.Tally:
    return fuzz_wire.fuzz(count=COUNT, seed=1)


# -- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("digest", ["another codec's", "its own"])
@pytest.mark.parametrize(
    "codec",
    [make_codec("fp32"), make_codec("int4"), Chain(make_codec("bf16"), make_codec("int2"))],
    ids=lambda c: c.config.kind,
)
def test_a_table_that_a_bound_decoder_refuses_is_not_parsed(codec: Codec, digest: str) -> None:
    bound = codec.bind(BOUND)
    sent = bound.digest if digest == "its own" else bytes(8)
    blob = with_table(bound, sent, long_table(1 << 17))
    began = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(CodecMismatchError):
        bound.decoder.decode(Payload.from_bytes(blob))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Measured 1.0 times its length, the copy of the table, and 2 ms; parsed 31 times and 1.5 s.
    assert peak < 2 * len(blob) + 20_000
    assert time.perf_counter() - began < 0.5


def test_a_table_that_nobody_looks_at_is_as_good_as_none() -> None:
    bound = Identity().bind(BOUND)
    with pytest.raises(CodecMismatchError, match="tensor table in the payload: one"):
        bound.decoder.decode(Payload.from_bytes(with_table(bound, bound.digest, b"\xff nonsense")))


def test_a_malformed_table_comes_back_as_it_came_and_is_found_when_it_is_looked_at() -> None:
    blob = with_table(Identity(), Identity().digest, b"\1\1w\0\0")
    payload = Payload.from_bytes(blob)
    assert (payload.to_bytes(), payload.has_table) == (blob, True)
    assert "a tensor table" in repr(payload)
    for _ in range(2):
        with pytest.raises(WireError, match="unknown dtype"):
            _ = payload.spec


@pytest.mark.parametrize("count", [2, 1 << 10, MAX_TENSORS])
def test_rows_are_counted_against_the_bytes_that_are_left(count: int) -> None:
    table = fuzz_wire.varint(count) + b"\0\1\0" * (count // 2)
    began = time.perf_counter()
    with pytest.raises(TruncatedError, match=f"expected {count} rows"):
        spec_from_bytes(table)
    assert time.perf_counter() - began < 0.05


# -- bodies ----------------------------------------------------------------------------------------

NEAR = (0x7F00, 0x7E80, 0x7E00, 0x7C80, 0x7A00, 0x7900)
"""bf16 scales from 1.7e38 down to 4e34, at which levels or their sums leave fp32."""


@pytest.mark.parametrize("scale", NEAR, ids=hex)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("rotate", [False, True], ids=["plain", "rotated"])
def test_no_body_of_block_quantisation_decodes_to_infinity(
    scale: int, bits: int, rotate: bool
) -> None:
    config = BlockQuantConfig(bits, 4096, scale="absmax", rotate=rotate)
    codec = BlockQuant(config).bind(UpdateSpec((TensorSpec("w", (4096,)),)))
    for fill in (b"\0", b"\xff", b"\x88"):
        body = scale.to_bytes(2, "little") + fill * (512 * bits)
        try:
            decoded = codec.decoder.decode(Payload("blockquant", codec.digest, body))["w"]
        except MalformedBodyError:
            continue
        assert decoded.isfinite().all()


@pytest.mark.parametrize("scale", NEAR, ids=hex)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_no_body_of_top_k_decodes_to_infinity(scale: int, bits: int) -> None:
    config = TopKConfig(k=8, chunk=8, bits=bits)
    codec = TopK(config).bind(UpdateSpec((TensorSpec("w", (8,)),)))
    positions = pack_bits(torch.arange(8), 3).numpy().tobytes()
    for fill in (b"\0", b"\xff", b"\x88"):
        scales = scale.to_bytes(2, "little") * (2 if bits == 2 else 1)
        try:
            decoded = codec.decoder.decode(
                Payload("topk", codec.digest, scales + fill * bits + positions)
            )["w"]
        except MalformedBodyError as err:
            assert "finite" in str(err)  # noqa: PT017  not of another length
            continue
        assert decoded.isfinite().all()


@pytest.mark.parametrize("scale", NEAR, ids=hex)
def test_no_body_of_rotated_signs_decodes_to_infinity(scale: int) -> None:
    codec = RotatedSign().bind(UpdateSpec((TensorSpec("w", (256,)),)))
    for fill in (b"\0", b"\xff", b"\x55"):
        body = bytes(4) + scale.to_bytes(2, "little") + fill * 32
        try:
            decoded = codec.decoder.decode(Payload("rotsign", codec.digest, body))["w"]
        except MalformedBodyError:
            continue
        assert decoded.isfinite().all()


@pytest.mark.parametrize("scale", NEAR, ids=hex)
def test_no_body_of_the_largest_rotated_signs_decodes_to_infinity(scale: int) -> None:
    config = RotatedSignConfig(256, 64, "largest")
    codec = RotatedSign(config).bind(UpdateSpec((TensorSpec("w", (256,)),)))
    honest = codec.encoder.encode({"w": torch.randn(256)}).body
    body = honest[:4] + scale.to_bytes(2, "little") + honest[6:]
    try:
        decoded = codec.decoder.decode(Payload("rotsign", codec.digest, body))["w"]
    except MalformedBodyError:
        return
    assert decoded.isfinite().all()


def test_an_honest_payload_near_the_end_of_fp32_is_read() -> None:
    update = {"w": torch.tensor([3e38, -3e38, 0.0, 1e38])}
    for name in ("int8", "int4", "sign"):
        codec = make_codec(name)
        assert codec.decoder.decode(codec.encoder.encode(update))["w"].isfinite().all()


# -- the fuzzer ------------------------------------------------------------------------------------


def test_damaged_payloads_decode_or_raise_a_wire_error(tally: fuzz_wire.Tally) -> None:
    assert tally.surprises == []


def test_nothing_is_uncounted(tally: fuzz_wire.Tally) -> None:
    assert tally.outcomes.total() == COUNT


def test_the_damage_reaches_the_bodies(tally: fuzz_wire.Tally) -> None:
    reached = tally.repaired["MalformedBodyError"] + tally.repaired[fuzz_wire.DECODED]
    assert reached > 0.15 * COUNT  # measured 0.27


def test_memory_stays_like_the_payloads_size(tally: fuzz_wire.Tally) -> None:
    # Measured 8.5 kB, for payloads of up to 2.1 kB; values themselves are torch's memory.
    assert tally.peak_bytes < 50_000


def test_every_codec_is_a_source() -> None:
    assert {s.codec.config.kind for s in fuzz_wire.sources()} == set(CODEC_IDS)


def test_equal_seeds_damage_equally() -> None:
    assert fuzz_wire.fuzz(60, seed=5).outcomes == fuzz_wire.fuzz(60, seed=5).outcomes


def test_a_surprise_is_found_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = fuzz_wire.outcome

    def careless(blob: bytes, codec, by_digest) -> str:  # type: ignore[no-untyped-def]
        name = real(blob, codec, by_digest)
        if name == "TruncatedError":
            raise IndexError("out of range")
        return name

    monkeypatch.setattr(fuzz_wire, "outcome", careless)
    out = tmp_path / "rows.jsonl"
    assert fuzz_wire.main(["--count", "50", "--out", str(out)]) == 1
    assert json.loads(out.read_text())["anything_else"] > 0
    assert "IndexError: out of range" in capsys.readouterr().out
