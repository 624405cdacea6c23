"""Laws of the bytes around payloads: they come back, and nothing else is accepted."""

import struct
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradcodec.errors import (
    BadMagicError,
    ChecksumError,
    LimitError,
    MalformedBodyError,
    TrailingBytesError,
    TruncatedError,
    UnsupportedVersionError,
    WireError,
)
from gradcodec.federated.envelope import INCREMENT, SNAPSHOT, VALUES, Broadcast, Reply
from gradcodec.federated.participants import ClientId
from gradcodec.wire import Payload

PAYLOAD = Payload("identity", b"12345678", b"body", None, b"baseBASE")
KEPT = Payload("identity", b"abcdefgh", b"kept")
REPLY = Reply(3, 7, 40, PAYLOAD)
WHOLE = Reply("zürich", 2**40, 2**50, PAYLOAD, KEPT)
BROADCAST = Broadcast(
    5,
    ((INCREMENT, b"first"), (SNAPSHOT, b""), (INCREMENT, b"x" * 300), (VALUES, b"v")),
    b"LINEAGE8",
)
MESSAGES = {"reply": REPLY, "whole reply": WHOLE, "broadcast": BROADCAST}


def sealed(message: bytes) -> bytes:
    """A message with its checksum, as WIRE.md says."""
    return message + struct.pack("<I", zlib.crc32(message) ^ 0xFFFFFFFF)


def sealed_1(message: bytes) -> bytes:
    """A message of version 1 with its checksum."""
    return message + struct.pack("<I", zlib.crc32(message))


def reply_1(client: int, number: int, examples: int, payload: bytes) -> bytes:
    return sealed_1(struct.pack("<III", client, number, examples) + payload)


counts = st.integers(0, 2**63 - 1)
ids = st.one_of(
    st.integers(0, 2**64 - 1),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=60),
)


@given(ids, counts, st.integers(1, 2**63 - 1), st.binary(max_size=50), st.booleans())
def test_a_reply_comes_back(
    client: ClientId, number: int, examples: int, body: bytes, kept: bool
) -> None:
    payload = Payload("cast", b"12345678", body)
    reply = Reply(client, number, examples, payload, KEPT if kept else None)
    assert Reply.from_bytes(reply.to_bytes()) == reply


def test_a_small_reply_costs_twelve_bytes_around_its_payload() -> None:
    assert len(REPLY.to_bytes()) == 8 + len(PAYLOAD.to_bytes()) + 4
    # A Flower node id takes seven more.
    flower = Reply(2**64 - 1, 7, 40, PAYLOAD)
    assert len(flower.to_bytes()) == len(REPLY.to_bytes()) + 7


parts = st.tuples(st.sampled_from([INCREMENT, SNAPSHOT, VALUES]), st.binary(max_size=40))


@given(counts, st.lists(parts, max_size=6).map(tuple), st.binary(min_size=8, max_size=8))
def test_a_broadcast_comes_back(
    number: int, given_parts: tuple[tuple[int, bytes], ...], lineage: bytes
) -> None:
    message = Broadcast(number, given_parts, lineage)
    assert Broadcast.from_bytes(message.to_bytes()) == message


u32 = st.integers(0, 2**32 - 1)


@given(u32, u32, st.integers(1, 2**32 - 1), st.binary(max_size=50))
def test_a_reply_of_version_1_is_read(client: int, number: int, examples: int, body: bytes) -> None:
    payload = Payload("cast", b"12345678", body)
    read = Reply.from_bytes(reply_1(client, number, examples, payload.to_bytes()))
    assert read == Reply(client, number, examples, payload, None, version=1)


@given(u32, st.lists(parts, max_size=6).map(tuple))
def test_a_broadcast_of_version_1_is_read(
    number: int, given_parts: tuple[tuple[int, bytes], ...]
) -> None:
    out = struct.pack("<IH", number, len(given_parts))
    for kind, part in given_parts:
        out += struct.pack("<BQ", kind, len(part)) + part
    assert Broadcast.from_bytes(sealed_1(out)) == Broadcast(number, given_parts, None)


def test_a_version_1_reply_that_looks_like_a_newer_one_is_still_read() -> None:
    client = int.from_bytes(b"GR\x02\x00", "little")
    read = Reply.from_bytes(reply_1(client, 1, 2, PAYLOAD.to_bytes()))
    assert (read.client, read.version) == (client, 1)


HEAD = b"GR\x02\x07\x28"  # round 7, 40 examples


@pytest.mark.parametrize(
    ("blob", "error"),
    [
        (b"", TruncatedError),
        (REPLY.to_bytes()[:6], TruncatedError),
        (REPLY.to_bytes()[:-1], ChecksumError),
        (sealed(REPLY.to_bytes()[:-5]), TruncatedError),
        (sealed(REPLY.to_bytes()[:-4] + b"\0"), TrailingBytesError),
        (sealed(b"GR\x02\x07\x00\x01\x03\x00" + PAYLOAD.to_bytes()), MalformedBodyError),
        (REPLY.to_bytes()[:6] + b"\x04" + REPLY.to_bytes()[7:], ChecksumError),
        (REPLY.to_bytes()[:-6] + b"D" + REPLY.to_bytes()[-5:], ChecksumError),
        (sealed(b"GX" + REPLY.to_bytes()[2:-4]), BadMagicError),
        (sealed(b"GR\x03" + REPLY.to_bytes()[3:-4]), UnsupportedVersionError),
        (sealed(HEAD + b"\x02\x03\x00\x00" + PAYLOAD.to_bytes()), LimitError),
        (sealed(HEAD + b"\x0a" + bytes(10) + PAYLOAD.to_bytes()), LimitError),
        (sealed(HEAD + b"\x09\x00\x00" + PAYLOAD.to_bytes()), LimitError),
        (sealed(HEAD + b"\x09\x02\xff\xff\x00" + PAYLOAD.to_bytes()), MalformedBodyError),
        (sealed(HEAD + b"\x01\x03\x7f" + PAYLOAD.to_bytes()), TruncatedError),
        (reply_1(3, 7, 0, PAYLOAD.to_bytes()), MalformedBodyError),
        (sealed_1(b"short"), TruncatedError),
    ],
    ids=[
        *("nothing", "header", "cut", "payload", "trailing", "no examples", "client", "flipped"),
        *("magic", "version", "long number", "client kind", "no name", "name", "values"),
        *("no examples, version 1", "header, version 1"),
    ],
)
def test_a_bad_reply_is_named(blob: bytes, error: type[WireError]) -> None:
    with pytest.raises(error):
        Reply.from_bytes(blob)


START = b"GB\x02\x01LINEAGE8"


@pytest.mark.parametrize(
    ("blob", "error"),
    [
        (b"", TruncatedError),
        (sealed(b"GB\x02\x01LINEAGE"), TruncatedError),
        (sealed(START + b"\x01\x09short"), TruncatedError),
        (sealed(START + b"\x01" + b"\xff" * 8 + b"\x7f"), TruncatedError),
        (sealed(START + b"\x03\x00"), LimitError),
        (sealed(START + b"\x00\x00"), LimitError),
        (BROADCAST.to_bytes()[:-1] + b"!", ChecksumError),
        (sealed_1(struct.pack("<IH", 1, 2)), TruncatedError),
        (sealed_1(struct.pack("<IHBQ", 1, 1, INCREMENT, 9) + b"short"), TruncatedError),
        (sealed_1(struct.pack("<IHBQ", 1, 1, INCREMENT, 2**64 - 1)), TruncatedError),
        (sealed_1(struct.pack("<IHBQ", 1, 1, 3, 0)), LimitError),
        (sealed_1(struct.pack("<IH", 1, 0) + b"!"), TrailingBytesError),
    ],
    ids=[
        *("nothing", "lineage", "part", "huge part", "kind 3", "kind 0", "flipped"),
        *("1: parts", "1: part", "1: huge part", "1: kind 3", "1: trailing"),
    ],
)
def test_a_bad_broadcast_is_named(blob: bytes, error: type[WireError]) -> None:
    with pytest.raises(error):
        Broadcast.from_bytes(blob)


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_every_shorter_message_is_refused(message: Reply | Broadcast) -> None:
    blob = message.to_bytes()
    for cut in range(len(blob)):
        with pytest.raises(WireError):
            type(message).from_bytes(blob[:cut])


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_every_flipped_bit_is_noticed(message: Reply | Broadcast) -> None:
    blob = message.to_bytes()
    for bit in range(8 * len(blob)):
        changed = bytearray(blob)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ChecksumError):
            type(message).from_bytes(bytes(changed))


def read_or_refused(blob: bytes) -> None:
    for kind in (Reply, Broadcast):
        with suppress(WireError):
            read = kind.from_bytes(blob)
            if getattr(read, "version", 2) == 2 and getattr(read, "lineage", b"") is not None:
                assert read.to_bytes() == blob  # one spelling


@given(st.binary(max_size=80), st.sampled_from([sealed, sealed_1, bytes]))
def test_any_bytes_are_read_or_refused(blob: bytes, seal: object) -> None:
    assert callable(seal)
    read_or_refused(seal(blob))


@given(st.sampled_from(list(MESSAGES.values())), st.data())
def test_altered_messages_are_read_or_refused(
    message: Reply | Broadcast, data: st.DataObject
) -> None:
    changed = bytearray(message.to_bytes()[:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    read_or_refused(sealed(bytes(changed)))
