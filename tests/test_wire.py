"""The payload reader: whatever the bytes, a Payload or a WireError, at a cost like their size."""

import contextlib
import dataclasses
import random
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator

import conformance
import pytest
import torch
from conformance import CASES, Case
from hypothesis import given
from hypothesis import strategies as st

from gradcodec import wire
from gradcodec.codecs import BlockQuant, Identity
from gradcodec.encodable import DTYPE_CODES
from gradcodec.errors import (
    LimitError,
    MalformedSpecError,
    TruncatedError,
    UpdateError,
    WireError,
)
from gradcodec.types import TensorSpec, UpdateSpec
from gradcodec.wire import CODEC_IDS, MAX_DIMS, MAX_NAME_BYTES, MAX_NUMEL, MAX_TENSORS, Payload

TENSORS = st.builds(
    TensorSpec,
    st.text(max_size=12),
    st.lists(st.integers(0, 300), max_size=4).map(tuple),
    st.sampled_from(list(DTYPE_CODES)),
)
SPECS = st.lists(TENSORS, max_size=5, unique_by=lambda t: t.name).map(
    lambda tensors: UpdateSpec(tuple(tensors))
)
DIGESTS = st.binary(min_size=8, max_size=8)
PAYLOADS = st.builds(
    Payload,
    st.sampled_from(list(CODEC_IDS)),
    DIGESTS,
    st.binary(max_size=300),
    st.none() | SPECS,
    st.none() | DIGESTS,
)


def sealed(head: bytes) -> bytes:
    """Bytes with the CRC-32 that belongs to them."""
    return head + zlib.crc32(head).to_bytes(4, "little")


def example() -> bytes:
    """A payload with every field: table, base and body."""
    update = {"w": torch.arange(3.0), "é": torch.zeros(2, 0, dtype=torch.int64)}
    codec = Identity(base=bytes(range(8)))
    return codec.encoder.encode(update).to_bytes()


def with_table(table: bytes) -> bytes:
    """An unbound identity payload of this tensor table and an empty body, correctly sealed."""
    digest = Identity().digest
    head = b"GC\1\1\1" + digest + wire._varint(len(table)) + table + b"\0"
    return sealed(head)


def row(name: bytes, *sizes: int, dtype: int = 1) -> bytes:
    """One row of a tensor table."""
    sent = b"".join(wire._varint(s) for s in sizes)
    return wire._varint(len(name)) + name + bytes((dtype, len(sizes))) + sent


def look(blob: bytes) -> UpdateSpec | None:
    """Read a payload and its tensor table, which is not looked at before somebody asks for it."""
    return Payload.from_bytes(blob).spec


def cost(read: Callable[[], object]) -> int:
    """Peak of the memory that Python allocates while reading; the outcome does not matter."""
    tracemalloc.start()
    try:
        read()
    except WireError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


# -- round trips ---------------------------------------------------------------------------------


@given(PAYLOADS)
def test_payloads_come_back(payload: Payload) -> None:
    assert Payload.from_bytes(payload.to_bytes()) == payload


@given(PAYLOADS)
def test_bytes_come_back(payload: Payload) -> None:
    blob = payload.to_bytes()
    assert Payload.from_bytes(blob).to_bytes() == blob


@given(SPECS)
def test_specs_come_back(spec: UpdateSpec) -> None:
    assert wire.spec_from_bytes(wire.spec_to_bytes(spec)) == spec


@given(PAYLOADS)
def test_overhead_is_as_written(payload: Payload) -> None:
    table = b"" if payload.spec is None else wire.spec_to_bytes(payload.spec)
    fields = 17 + len(wire._varint(len(payload.body))) + len(payload.body)
    fields += 8 if payload.base is not None else 0
    fields += 0 if payload.spec is None else len(wire._varint(len(table))) + len(table)
    assert len(payload.to_bytes()) == fields


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_any_buffer_is_read(kind: type) -> None:
    assert Payload.from_bytes(kind(example())) == Payload.from_bytes(example())


def test_a_payload_does_not_share_the_buffer_it_was_read_from() -> None:
    buffer = bytearray(example())
    payload = Payload.from_bytes(buffer)
    buffer[:] = bytes(len(buffer))
    assert payload == Payload.from_bytes(example())


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
def test_raw_values_come_back(dtype: torch.dtype) -> None:
    values = torch.arange(24).view(4, 6).to(dtype).T
    assert torch.equal(wire.raw_tensor(wire.raw_bytes(values), dtype).view(6, 4), values)


# -- varints -------------------------------------------------------------------------------------


@given(st.integers(0, 2**63 - 1))
def test_varints_come_back(value: int) -> None:
    reader = wire._Reader(memoryview(wire._varint(value)), 0)
    assert (reader.varint("number"), reader.at) == (value, len(wire._varint(value)))


@given(st.binary(min_size=1, max_size=12))
def test_a_varint_has_one_spelling(raw: bytes) -> None:
    reader = wire._Reader(memoryview(raw), 0)
    try:
        value = reader.varint("number")
    except WireError:
        return
    assert wire._varint(value) == raw[: reader.at]


@pytest.mark.parametrize("raw", [b"\x80\0", b"\x81\x80\0", b"\x80" * 9 + b"\1", b"\xff" * 9])
def test_longer_and_larger_varints_are_refused(raw: bytes) -> None:
    with pytest.raises(LimitError):
        wire._Reader(memoryview(raw), 0).varint("number")


# -- damage --------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_any_bytes_are_a_payload_or_a_wire_error(blob: bytes) -> None:
    with contextlib.suppress(WireError):
        Payload.from_bytes(blob)


@given(st.binary(max_size=200), st.integers(0, 3), st.sampled_from(sorted(CODEC_IDS.values())))
def test_any_bytes_after_a_header_are_a_payload_or_a_wire_error(
    rest: bytes, flags: int, codec: int
) -> None:
    with contextlib.suppress(WireError):
        look(sealed(bytes((0x47, 0x43, 1, codec, flags)) + rest))


@given(st.binary(max_size=100))
def test_any_bytes_are_a_tensor_table_or_a_wire_error(table: bytes) -> None:
    try:
        spec = wire.spec_from_bytes(table)
    except WireError:
        return
    assert wire.spec_to_bytes(spec) == table


def test_every_flipped_bit_is_an_error() -> None:
    blob = example()
    unseen = []
    for bit in range(8 * len(blob)):
        damaged = bytearray(blob)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            Payload.from_bytes(damaged)
        except WireError:
            continue
        unseen.append(bit)
    assert unseen == []


def test_every_truncation_is_a_truncated_error() -> None:
    blob = example()
    for length in range(len(blob)):
        with pytest.raises(TruncatedError):
            Payload.from_bytes(blob[:length])


def test_every_burst_of_up_to_four_bytes_is_an_error() -> None:
    # A CRC-32 finds every burst of up to 32 bits, wherever it lies.
    blob, rng = example(), random.Random(0)
    for at in range(len(blob) - 4):
        damaged = bytearray(blob)
        for i in range(4):
            damaged[at + i] ^= rng.randrange(1, 256)
        with pytest.raises(WireError):
            Payload.from_bytes(damaged)


# -- hostile tables ------------------------------------------------------------------------------

HOSTILE = {
    "2^62 elements": (b"\1" + row(b"w", 1 << 62), LimitError),
    "2^62 times nothing": (b"\1" + row(b"w", 1 << 62, 0), LimitError),
    "a product over the limit": (b"\1" + row(b"w", 1 << 40, 1 << 40), LimitError),
    "nothing times a product over the limit": (
        b"\1" + row(b"w", 0, 1 << 40, 1 << 40),
        LimitError,
    ),
    "sixteen sizes of 2^62": (b"\1" + row(b"w", *[1 << 62] * 16), LimitError),
    "a sum over the limit": (
        b"\2" + row(b"v", MAX_NUMEL) + row(b"w", 1),
        LimitError,
    ),
    "17 dimensions": (b"\1" + row(b"w", *[1] * 17), MalformedSpecError),
    "255 dimensions": (b"\1" + row(b"w", *[1] * 255), MalformedSpecError),
    "a name twice": (b"\2" + row(b"w", 1) * 2, MalformedSpecError),
    "a name outside UTF-8": (b"\1" + row(b"\xff\xfe", 1), MalformedSpecError),
    "a surrogate in a name": (b"\1" + row(b"\xed\xa0\x80", 1), MalformedSpecError),
    "an unknown dtype": (b"\1" + row(b"w", 1, dtype=11), MalformedSpecError),
    "a long name": (b"\1" + row(b"w" * (MAX_NAME_BYTES + 1), 1), LimitError),
    "a name of 2^62 bytes": (b"\1" + wire._varint(1 << 62) + b"w", LimitError),
    "a million tensors announced": (wire._varint(MAX_TENSORS) + row(b"w", 1), TruncatedError),
    "more tensors than the limit": (wire._varint(MAX_TENSORS + 1), LimitError),
    "2^62 tensors announced": (wire._varint(1 << 62), LimitError),
    "a row too many": (b"\1" + row(b"v", 1) + row(b"w", 1), MalformedSpecError),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tables_raise_their_error(name: str) -> None:
    table, error = HOSTILE[name]
    with pytest.raises(WireError) as caught:
        look(with_table(table))
    assert type(caught.value) is error


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tables_cost_no_memory(name: str) -> None:
    blob = with_table(HOSTILE[name][0])
    # Measured: at most 12 kB (an error with its message), whatever the table announces.
    assert cost(lambda: look(blob)) < 20_000 + 10 * len(blob)


def test_the_largest_allowed_table_is_read() -> None:
    table = b"\1" + row(b"w" * MAX_NAME_BYTES, MAX_NUMEL, *[1] * (MAX_DIMS - 1))
    assert wire.spec_from_bytes(table).numel == MAX_NUMEL


def test_announced_elements_are_not_allocated_by_the_decoder() -> None:
    blob = with_table(b"\1" + row(b"w", MAX_NUMEL))
    for codec in (Identity(), BlockQuant()):
        payload = dataclasses.replace(
            Payload.from_bytes(blob), codec=codec.config.kind, digest=codec.digest
        )

        def decode(codec=codec, payload=payload) -> None:
            codec.decoder.decode(payload)

        assert cost(decode) < 20_000
        with pytest.raises(WireError, match="expected a body"):
            decode()


def rows(count: int, name: Callable[[int], bytes]) -> bytes:
    """A sealed payload with a table of ``count`` scalars."""
    return with_table(wire._varint(count) + b"".join(row(name(i)) for i in range(count)))


@pytest.mark.parametrize("twice", [False, True], ids=["unique names", "equal names"])
def test_memory_of_a_long_table_is_a_bounded_multiple_of_it(twice: bool) -> None:
    blob = rows(20_000, lambda i: b"name" if twice else f"{i:x}".encode())
    # Python objects for a row of 6 bytes: measured 25 and 45 times.
    assert cost(lambda: look(blob)) < 100 * len(blob)


def test_a_long_table_of_equal_names_takes_linear_time() -> None:
    blob = rows(50_000, lambda i: b"%x" % (i // 2))
    began = time.perf_counter()
    with pytest.raises(MalformedSpecError):
        look(blob)
    # Measured 0.25 s; comparing all pairs took 35 s.
    assert time.perf_counter() - began < 10


def test_a_message_does_not_repeat_the_whole_table() -> None:
    with pytest.raises(MalformedSpecError) as caught:
        look(rows(2_000, lambda i: b"%x" % (i // 2)))
    assert len(str(caught.value)) < 200


def test_the_writer_keeps_to_the_readers_limits() -> None:
    for name, shape in (("w" * (MAX_NAME_BYTES + 1), ()), ("w", (1,) * (MAX_DIMS + 1))):
        with pytest.raises(UpdateError):
            wire.spec_to_bytes(UpdateSpec((TensorSpec(name, shape),)))


# -- mutated payloads that pass the checksum -----------------------------------------------------


def mutations(blob: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Damaged copies, mostly behind the header, every CRC-32 repaired."""
    rng = random.Random(seed)
    for _ in range(count):
        damaged = bytearray(blob[:-4])
        for _ in range(rng.choice((1, 1, 2, 4))):
            at = rng.randrange(13, len(damaged))
            damaged[at] = rng.choice((0, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        yield sealed(bytes(damaged))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_repaired_mutations_decode_to_an_update_or_a_wire_error(case: Case) -> None:
    codec = case.for_(conformance.mixed())
    blob = codec.encoder.encode(conformance.mixed()).to_bytes()
    spec = UpdateSpec.of(conformance.mixed())
    for mutated in mutations(blob, 150, seed=0):
        try:
            payload = Payload.from_bytes(mutated)
            decoded = codec.decoder.decode(payload)
        except WireError:
            continue
        assert UpdateSpec.of(decoded) == (payload.spec or spec)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_any_body_of_the_right_length_decodes_or_is_malformed(case: Case) -> None:
    codec = case.for_(conformance.model())
    payload = codec.encoder.encode(conformance.model())
    for body in (
        bytes(len(payload.body)),
        b"\xff" * len(payload.body),
        b"\x7f" * len(payload.body),
        random.Random(0).randbytes(len(payload.body)),
    ):
        try:
            decoded = codec.decoder.decode(dataclasses.replace(payload, body=body))
        except WireError:
            continue
        assert UpdateSpec.of(decoded) == UpdateSpec.of(conformance.model())
