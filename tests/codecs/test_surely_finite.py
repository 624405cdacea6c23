"""What scales alone say about a body: never that it is finite when its values are not."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradcodec import make_codec
from gradcodec.errors import MalformedBodyError
from gradcodec.types import TensorSpec, UpdateSpec

NUMEL = 4096
SPEC = UpdateSpec((TensorSpec("x", (NUMEL,), torch.float32),))
NAMES = [
    "int8",
    "int4",
    "int2",
    "sign",
    "int8-rotated",
    "int4-rotated",
    "sign-rotated",
    "gauss4-64",
    "rotsign",
]
#: From a usual scale to the largest: high bytes of bf16 numbers.
HIGH = st.sampled_from([0x3F, 0x70, 0x78, 0x79, 0x7A, 0x7B, 0x7C, 0x7D, 0x7E, 0x7F])


@pytest.mark.parametrize("name", NAMES)
@given(high=HIGH, low=st.integers(0, 255), code=st.sampled_from([0x00, 0x88, 0xFF]))
def test_a_body_unpacks_to_finite_values_or_is_refused(
    name: str, high: int, low: int, code: int
) -> None:
    pipeline = make_codec(name).pipeline
    body = bytearray(pipeline.encode({"x": torch.zeros(NUMEL)}, SPEC, 1))
    begin = 4 if name == "rotsign" else 0
    scales = len(body) - begin - packed_bytes(name)
    body[begin : begin + scales] = bytes([low, high]) * (scales // 2)
    body[begin + scales :] = bytes([code]) * packed_bytes(name)
    try:
        values = pipeline.unpack_code(bytes(body), SPEC)
    except MalformedBodyError:
        return
    assert bool(torch.isfinite(values).all())


def packed_bytes(name: str) -> int:
    bits = {"int8": 8, "int4": 4, "int2": 2}.get(name.split("-")[0], 1)
    return NUMEL * bits // 8


@pytest.mark.parametrize("name", NAMES)
def test_usual_scales_say_it_without_a_pass(name: str) -> None:
    pipeline = make_codec(name).pipeline
    body = pipeline.encode({"x": torch.randn(NUMEL)}, SPEC, 1)
    assert pipeline.packer.surely_finite(
        torch.frombuffer(bytearray(body), dtype=torch.uint8), NUMEL
    )
