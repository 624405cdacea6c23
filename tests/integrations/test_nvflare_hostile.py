"""What a site sends costs at most its own reply, and the server's log says whose it was and why."""

import logging
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("nvflare", reason="pip install 'gradcodec[nvflare]'")

from integrations.nvflare_toy import context, through, update
from nvflare.apis.dxo import DXO, MetaKey

from gradcodec.integrations.messages.tables import MAX_TABLE_BYTES
from gradcodec.integrations.nvflare import DecodeUpdate, EncodeUpdate
from gradcodec.registry import make_codec
from gradcodec.types import TensorSpec, UpdateSpec
from gradcodec.wire import Payload, spec_to_bytes

SERVER = context("server", peer=context("site-7"))


def encoded() -> DXO:
    sent = update(w=np.ones((20, 30), np.float32), count=np.array(3))
    return through(sent, EncodeUpdate("int4"))


def as_bytes(part: bytes) -> np.ndarray:
    return np.frombuffer(part, np.uint8)


def huge() -> dict[str, np.ndarray]:
    """A table that states 2^40 values, and a body of 5 bytes that has its codec's digest."""
    spec = UpdateSpec((TensorSpec("w", (1 << 20, 1 << 20)),))
    codec = make_codec("int4").bind(spec)
    table = zlib.compress(spec_to_bytes(spec))
    payload = Payload(codec.config.kind, codec.digest, bytes(5))
    return {"table": as_bytes(table), "coded": as_bytes(payload.to_bytes())}


def zeros_only(dxo: DXO) -> None:
    """A table of 2^40 values that are all left out."""
    table = huge()["table"]
    dxo.data.clear()
    dxo.data.update(table=table, still=as_bytes(b"\x80"))


def bomb() -> np.ndarray:
    return as_bytes(zlib.compress(bytes(20 * MAX_TABLE_BYTES)))


def flipped(part: np.ndarray) -> np.ndarray:
    return as_bytes(part[:-1].tobytes() + bytes([part[-1] ^ 1]))


Damage = Callable[[DXO], Any]
DAMAGES: dict[str, tuple[str, Damage]] = {
    "a changed byte": ("ChecksumError", lambda d: d.data.update(coded=flipped(d.data["coded"]))),
    "cut off": ("TruncatedError", lambda d: d.data.update(kept=d.data["kept"][:-1])),
    "empty": ("TruncatedError", lambda d: d.data.update(coded=as_bytes(b""))),
    "no coded part": ("MalformedBodyError", lambda d: d.data.pop("coded")),
    "no table": ("CodecMismatchError", lambda d: d.data.pop("table")),
    "one part more": ("MalformedBodyError", lambda d: d.data.update(more=as_bytes(b"x"))),
    "a name that is none": ("MalformedBodyError", lambda d: d.data.update({3: as_bytes(b"x")})),
    "floats for bytes": ("MalformedBodyError", lambda d: d.data.update(coded=np.ones(9))),
    "a text for bytes": ("MalformedBodyError", lambda d: d.data.update(coded="x")),
    "a table that is none": ("MalformedSpecError", lambda d: d.data.update(table=as_bytes(b"x"))),
    "half a table": ("MalformedSpecError", lambda d: d.data.update(table=d.data["table"][:-3])),
    "a table that inflates": ("LimitError", lambda d: d.data.update(table=bomb())),
    "a table of 2^40 values": (
        "MalformedBodyError",
        lambda d: (d.data.pop("kept"), d.data.update(huge())),
    ),
    "zeros of 2^40 values": ("LimitError", lambda d: zeros_only(d)),
    "too many bits": ("MalformedBodyError", lambda d: d.data.update(still=as_bytes(b"\x80\0"))),
    "a bit behind the last": ("MalformedBodyError", lambda d: d.data.update(still=as_bytes(b"\1"))),
    "no bit set": ("MalformedBodyError", lambda d: d.data.update(still=as_bytes(b"\0"))),
    "a still tensor that came": (
        "MalformedBodyError",
        lambda d: d.data.update(still=as_bytes(b"\x80")),
    ),
    "no note": ("MalformedBodyError", lambda d: d.meta.pop("gradcodec")),
    "a note of another kind": ("MalformedBodyError", lambda d: d.meta.update(gradcodec=[1])),
    "another library": ("MalformedBodyError", lambda d: d.meta["gradcodec"].update(tensors="jax")),
    "encrypted": ("ConfigError", lambda d: d.meta.update({MetaKey.PROCESSED_ALGORITHM: "CKKS"})),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_bad_reply_is_dropped_with_its_site_and_error(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    name, damage = DAMAGES[what]
    dxo = encoded()
    damage(dxo)
    with caplog.at_level(logging.ERROR):
        got = through(dxo, DecodeUpdate("int4"), at=SERVER)
    assert got.data == {}
    assert f"dropped the reply of site-7: {name}: " in caplog.text


def test_a_reply_of_another_codec_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    assert through(encoded(), DecodeUpdate("int4-rotated"), at=SERVER).data == {}
    assert "CodecMismatchError" in caplog.text


def test_numpy_has_no_bfloat16(caplog: pytest.LogCaptureFixture) -> None:
    dxo = through(update(w=torch.ones(3, dtype=torch.bfloat16)), EncodeUpdate("bf16"))
    dxo.meta["gradcodec"]["tensors"] = "numpy"
    assert through(dxo, DecodeUpdate("bf16"), at=SERVER).data == {}
    assert "MalformedBodyError: numpy has no such dtype" in caplog.text


@pytest.mark.parametrize(
    "what", ["a table that inflates", "a table of 2^40 values", "zeros of 2^40 values"]
)
def test_what_is_claimed_is_not_allocated(what: str) -> None:
    dxo = encoded()
    DAMAGES[what][1](dxo)
    tracemalloc.start()
    through(dxo, DecodeUpdate("int4"), at=SERVER)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * MAX_TABLE_BYTES


def test_a_plain_reply_passes() -> None:
    assert np.array_equal(
        through(update(w=np.ones(3)), DecodeUpdate("int4"), at=SERVER).data["w"], np.ones(3)
    )


@given(part=st.sampled_from(["table", "coded", "kept"]), data=st.data())
def test_no_bytes_raise_anything(part: str, data: st.DataObject) -> None:
    dxo = encoded()
    blob = bytearray(dxo.data[part].tobytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(blob) - 1))
        blob[at] = data.draw(st.integers(0, 255))
    dxo.data[part] = as_bytes(bytes(blob[: data.draw(st.integers(0, len(blob)))]))
    got = through(dxo, DecodeUpdate("int4"), at=SERVER)
    assert set(got.data) <= {"w", "count"}
