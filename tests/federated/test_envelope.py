"""Laws of the bytes around payloads: they come back, and nothing else is accepted."""

import struct
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradcodec.errors import (
    ChecksumError,
    LimitError,
    MalformedBodyError,
    TrailingBytesError,
    TruncatedError,
    WireError,
)
from gradcodec.federated.envelope import INCREMENT, SNAPSHOT, Broadcast, Reply
from gradcodec.wire import Payload

PAYLOAD = Payload("identity", b"12345678", b"body", None, b"baseBASE")
REPLY = Reply(3, 7, 40, PAYLOAD)
BROADCAST = Broadcast(5, ((INCREMENT, b"first"), (SNAPSHOT, b""), (INCREMENT, b"x" * 300)))


def sealed(message: bytes) -> bytes:
    """A message with its checksum, as WIRE.md says."""
    return message + struct.pack("<I", zlib.crc32(message))


u32 = st.integers(0, 2**32 - 1)


@given(u32, u32, st.integers(1, 2**32 - 1), st.binary(max_size=50))
def test_a_reply_comes_back(client: int, number: int, examples: int, body: bytes) -> None:
    reply = Reply(client, number, examples, Payload("cast", b"12345678", body))
    blob = reply.to_bytes()
    assert Reply.from_bytes(blob) == reply
    assert len(blob) == 12 + len(reply.payload.to_bytes()) + 4


parts = st.tuples(st.sampled_from([INCREMENT, SNAPSHOT]), st.binary(max_size=40))


@given(u32, st.lists(parts, max_size=6).map(tuple))
def test_a_broadcast_comes_back(number: int, given_parts: tuple[tuple[int, bytes], ...]) -> None:
    message = Broadcast(number, given_parts)
    blob = message.to_bytes()
    assert Broadcast.from_bytes(blob) == message
    assert len(blob) == 6 + sum(9 + len(b) for _, b in given_parts) + 4


@pytest.mark.parametrize(
    ("blob", "error"),
    [
        (b"", TruncatedError),
        (REPLY.to_bytes()[:15], TruncatedError),
        (REPLY.to_bytes()[:-1], ChecksumError),
        (sealed(REPLY.to_bytes()[:-5]), TruncatedError),
        (sealed(REPLY.to_bytes()[:-4] + b"\0"), TrailingBytesError),
        (sealed(struct.pack("<III", 3, 7, 0) + PAYLOAD.to_bytes()), MalformedBodyError),
        (b"\x04" + REPLY.to_bytes()[1:], ChecksumError),
        (REPLY.to_bytes()[:-6] + b"D" + REPLY.to_bytes()[-5:], ChecksumError),
    ],
    ids=["nothing", "header", "cut", "payload", "trailing", "no examples", "client", "flipped"],
)
def test_a_bad_reply_is_named(blob: bytes, error: type[WireError]) -> None:
    with pytest.raises(error):
        Reply.from_bytes(blob)


@pytest.mark.parametrize(
    ("blob", "error"),
    [
        (b"", TruncatedError),
        (sealed(struct.pack("<IH", 1, 2)), TruncatedError),
        (sealed(struct.pack("<IHBQ", 1, 1, INCREMENT, 9) + b"short"), TruncatedError),
        (sealed(struct.pack("<IHBQ", 1, 1, INCREMENT, 2**64 - 1)), TruncatedError),
        (sealed(struct.pack("<IHBQ", 1, 1, 3, 0)), LimitError),
        (sealed(struct.pack("<IHBQ", 1, 1, 0, 0)), LimitError),
        (sealed(BROADCAST.to_bytes()[:-4] + b"!"), TrailingBytesError),
        (BROADCAST.to_bytes()[:-1] + b"!", ChecksumError),
    ],
    ids=["nothing", "parts", "part", "huge part", "kind 3", "kind 0", "trailing", "flipped"],
)
def test_a_bad_broadcast_is_named(blob: bytes, error: type[WireError]) -> None:
    with pytest.raises(error):
        Broadcast.from_bytes(blob)


@pytest.mark.parametrize("message", [REPLY, BROADCAST], ids=["reply", "broadcast"])
def test_every_shorter_message_is_refused(message: Reply | Broadcast) -> None:
    blob = message.to_bytes()
    for cut in range(len(blob)):
        with pytest.raises(WireError):
            type(message).from_bytes(blob[:cut])


@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(blob: bytes) -> None:
    for kind in (Reply, Broadcast):
        with suppress(WireError):
            assert kind.from_bytes(blob).to_bytes() == blob


@given(st.sampled_from([REPLY.to_bytes(), BROADCAST.to_bytes()]), st.data())
def test_altered_messages_are_read_or_refused(blob: bytes, data: st.DataObject) -> None:
    changed = bytearray(blob)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    for kind in (Reply, Broadcast):
        with suppress(WireError):
            assert kind.from_bytes(bytes(changed)).to_bytes() == bytes(changed)
