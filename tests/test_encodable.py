"""What cannot be encoded is refused where it is handed over, with something to pass instead."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conformance import CASES
from torch import Tensor, distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from gradcodec import make_codec
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant
from gradcodec.encodable import MAX_DIMS, MAX_NAME_BYTES, MAX_NUMEL
from gradcodec.errors import ConfigError, HubError, NonFiniteError, UpdateError
from gradcodec.federated.replica import state_digest
from gradcodec.registry import UNTRAINED
from gradcodec.types import TensorSpec, UpdateSpec
from gradcodec.wire import Payload


def quiet(make: Callable[[], Any]) -> Any:
    """Nested and quantised tensors warn that they are prototypes or deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def inside_vmap() -> Any:
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    torch.func.vmap(look)(torch.ones(2, 3))
    return seen[0]


def two_parts(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


#: What came, and what the message says to pass instead.
UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse COO": (lambda: torch.eye(3).to_sparse(), "tensor.to_dense()"),
    "sparse CSR": (lambda: torch.eye(3).to_sparse_csr(), "tensor.to_dense()"),
    "oneDNN": (lambda: torch.ones(3, 3).to_mkldnn(), "tensor.to_dense()"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), "torch.view_as_real(tensor)"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "tensor.dequantize()",
    ),
    "nested": (lambda: two_parts(torch.strided), "tensor.unbind()"),
    "nested, jagged": (lambda: two_parts(torch.jagged), "tensor.unbind()"),
    "fp8": (lambda: torch.ones(3).to(torch.float8_e4m3fn), "tensor.float()"),
    "uint16": (lambda: torch.ones(3, dtype=torch.uint16), "tensor.to(torch.int64)"),
    "numpy": (lambda: np.ones(3), "torch.from_numpy(array)"),
    "a number of numpy": (lambda: np.float32(1), "torch.from_numpy(array)"),
    "a list": (lambda: [1.0, 2.0], "torch.tensor(values)"),
    "a number": (lambda: 1.0, "torch.tensor(values)"),
    "nothing": (lambda: None, "torch.tensor(values)"),
    "a module": (lambda: nn.Linear(2, 2), "torch.tensor(values)"),
    "fake": (lambda: FakeTensorMode().from_tensor(torch.ones(3)), "that it stands for"),
    "inside a transform": (inside_vmap, "what the transform returns"),
    "uninitialised": (lambda: nn.LazyLinear(3).weight, "first forward pass"),
}
INSTEAD: dict[str, Callable[[Any], Tensor]] = {
    "tensor.to_dense()": lambda x: x.to_dense(),
    "torch.view_as_real(tensor)": torch.view_as_real,
    "tensor.dequantize()": lambda x: x.dequantize(),
    "tensor.float()": lambda x: x.float(),
    "tensor.to(torch.int64)": lambda x: x.to(torch.int64),
    "torch.from_numpy(array)": lambda x: torch.from_numpy(np.asarray(x)),
    "torch.tensor(values)": torch.tensor,
}
BOUND = BlockQuant().bind(UpdateSpec((TensorSpec("w.1", (3,)),)))
TAKERS: dict[str, Callable[[Any], Any]] = {
    "a spec": UpdateSpec.of,
    "a spec's check": lambda update: BOUND.spec.check(update),
    "an encoder": lambda update: make_codec("int4").encoder.encode(update),
    "a bound encoder": lambda update: BOUND.encoder.encode(update),
    "an encoder without loss": lambda update: make_codec("fp32").encoder.encode(update),
    "a transform": lambda update: make_codec("int4").to_code(update),
    "a state's digest": state_digest,
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_is_no_plain_tensor_is_named_with_what_to_pass_instead(what: str, taker: str) -> None:
    make, instead = UNSUPPORTED[what]
    tensor = quiet(make)
    with pytest.raises(UpdateError, match=r"^'w\.1'.*got|^'w\.1' has dtype") as caught:
        TAKERS[taker]({"w.1": tensor})
    assert instead in str(caught.value)


@pytest.mark.parametrize("taker", [t for t in TAKERS if t != "a spec"])
def test_a_tensor_without_values_is_refused_where_values_are_needed(taker: str) -> None:
    with pytest.raises(UpdateError, match=r"'w\.1'.*meta tensor.* pass a tensor on a device"):
        TAKERS[taker]({"w.1": torch.ones(3, device="meta")})


def test_a_spec_can_be_taken_of_a_model_that_has_no_values_yet() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 3)
    assert UpdateSpec.of(dict(model.named_parameters())).numel == 15


@pytest.mark.parametrize(
    "what",
    [w for w, (_, i) in UNSUPPORTED.items() if i in INSTEAD and w not in ("nothing", "a module")],
)
def test_what_a_message_says_to_pass_can_be_encoded(what: str) -> None:
    make, instead = UNSUPPORTED[what]
    update = {"w": INSTEAD[instead](quiet(make))}
    codec = make_codec("fp32")
    assert torch.equal(codec.decoder.decode(codec.encoder.encode(update))["w"], update["w"])


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("taker", TAKERS)
def test_a_part_of_a_sharded_tensor_is_refused(taker: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.ones(3)
    sharded = distribute_tensor(whole, init_device_mesh("cpu", (1,)), [Shard(0)])
    with pytest.raises(UpdateError, match=r"'w\.1'.*DTensor.* pass tensor\.full_tensor\(\)"):
        TAKERS[taker]({"w.1": sharded})
    TAKERS[taker]({"w.1": sharded.full_tensor()})


@pytest.mark.parametrize(
    ("update", "instead"),
    [
        (nn.Linear(2, 2), "dict(module.named_parameters())"),
        ([torch.ones(2)], "a dict such as"),
        (nn.Linear(2, 2).named_parameters(), "a dict such as"),
        (torch.ones(2), "{name: tensor}"),
        (None, "a dict such as"),
    ],
    ids=["a module", "a list", "an iterator", "a tensor", "nothing"],
)
@pytest.mark.parametrize("taker", TAKERS)
def test_what_has_no_names_is_refused(update: Any, instead: str, taker: str) -> None:
    with pytest.raises(UpdateError, match=re.escape(instead)):
        TAKERS[taker](update)


@pytest.mark.parametrize("name", [1, None, b"w", ("a", "b")])
@pytest.mark.parametrize("taker", TAKERS)
def test_a_name_is_text(name: Any, taker: str) -> None:
    with pytest.raises(UpdateError, match="names that are text"):
        TAKERS[taker]({name: torch.ones(3)})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([TensorSpec("\ud800", ())], r"'\\ud800' is not text"),
        ([TensorSpec("w" * (MAX_NAME_BYTES + 1), ())], "at most 4096 bytes"),
        ([TensorSpec("é" * (MAX_NAME_BYTES // 2 + 1), ())], "at most 4096 bytes"),
        ([TensorSpec("w", (1,) * (MAX_DIMS + 1))], "at most 16 sizes"),
        ([TensorSpec("w", (-1,))], "none negative"),
        ([TensorSpec("w", (MAX_NUMEL + 1,))], "elements"),
        ([TensorSpec("w", (10**5000,))], "elements, got .*very many digits"),
        ([TensorSpec("w", (0, MAX_NUMEL, 2))], "elements"),
        ([TensorSpec("v", (MAX_NUMEL,)), TensorSpec("w", (1,))], "elements"),
        ([TensorSpec("w", ()), TensorSpec("w", ())], "twice"),
        ([TensorSpec("w", (), "float32")], "dtype float32; expected one of"),  # type: ignore[arg-type]
    ],
)
def test_a_table_that_cannot_travel_is_not_made(tensors: list[TensorSpec], message: str) -> None:
    with pytest.raises(UpdateError, match=message) as caught:
        UpdateSpec(tuple(tensors))
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("shape", [(1.5,), ("2",), None, 3, (None,)])
def test_a_shape_is_of_whole_numbers(shape: Any) -> None:
    with pytest.raises(UpdateError, match="whole numbers"):
        TensorSpec("w", shape)


# -- what stays possible ---------------------------------------------------------------------------

PLAIN: dict[str, Callable[[], Tensor]] = {
    "a parameter": lambda: nn.Parameter(torch.randn(4, 3)),
    "with a graph": lambda: torch.randn(4, 3, requires_grad=True) * 2,
    "transposed": lambda: torch.randn(3, 4).T,
    "strided": lambda: torch.randn(8, 3)[::2],
    "expanded": lambda: torch.randn(1, 3).expand(4, 3),
    "channels last": lambda: torch.randn(1, 3, 2, 2).to(memory_format=torch.channels_last),
    "the imaginary part of a conjugate": lambda: torch.randn(3, dtype=torch.cfloat).conj().imag,
    "inference": lambda: torch.inference_mode()(lambda: torch.randn(3))(),
    "empty": lambda: torch.zeros(0, 3),
    "a scalar": lambda: torch.tensor(1.5),
}


@pytest.mark.parametrize("what", PLAIN)
def test_dense_tensors_of_any_strides_travel(what: str) -> None:
    update = {"w": PLAIN[what]()}
    codec = make_codec("fp32")
    assert torch.equal(codec.decoder.decode(codec.encoder.encode(update))["w"], update["w"])
    lossy = make_codec("int8")
    decoded = lossy.decoder.decode(lossy.encoder.encode(update))["w"]
    assert torch.allclose(decoded, update["w"].detach().float(), atol=0.05)


def test_a_parameter_dict_is_an_update() -> None:
    update = nn.ParameterDict({"w": torch.randn(3)})
    codec = make_codec("fp32")
    decoded = codec.decoder.decode(codec.encoder.encode(update))  # type: ignore[arg-type]
    assert torch.equal(decoded["w"], update["w"])


# -- integers and loss -----------------------------------------------------------------------------

COUNTER = {"w": torch.randn(70), "n": torch.tensor(7), "mask": torch.tensor([True, False])}
LOSSY = [n for n in UNTRAINED if n not in ("fp32", "fp16", "bf16")]


@pytest.mark.parametrize("name", LOSSY)
def test_integers_are_refused_with_a_way_out_that_exists(name: str) -> None:
    with pytest.raises(UpdateError, match=r"n: int64\[\]: only floating") as caught:
        make_codec(name).encoder.encode(COUNTER)
    (way_out,) = re.findall(r"make_codec\('(\w+)'\)", str(caught.value))
    whole = {n: t for n, t in COUNTER.items() if not t.is_floating_point()}
    for codec in (make_codec(way_out), make_codec(way_out).bind(UpdateSpec.of(whole))):
        decoded = codec.decoder.decode(codec.encoder.encode(whole))
        assert all(torch.equal(decoded[n], whole[n]) for n in whole)
    floating = {n: t for n, t in COUNTER.items() if t.is_floating_point()}
    make_codec(name).encoder.encode(floating)


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_codec_is_not_bound_to_integers(name: str) -> None:
    with pytest.raises(UpdateError, match="only floating"):
        make_codec(name).bind(UpdateSpec.of(COUNTER))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_no_codec_takes_integers_that_it_gives_back_as_zeros(case: Any) -> None:
    try:
        codec: Codec = case.for_(COUNTER)
        payload = codec.encoder.encode(COUNTER)
    except UpdateError:
        return
    decoded = codec.decoder.decode(payload)
    assert all(torch.equal(decoded[n], COUNTER[n]) for n in ("n", "mask"))


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_integers_travel_whole_where_nothing_else_is_promised(name: str) -> None:
    codec = make_codec(name).bind(UpdateSpec.of(COUNTER))
    decoded = codec.decoder.decode(codec.encoder.encode(COUNTER))
    assert all(torch.equal(decoded[n], COUNTER[n]) for n in ("n", "mask"))


# -- what a codec is bound to ----------------------------------------------------------------------


def test_a_codec_is_bound_to_a_spec_and_says_so() -> None:
    with pytest.raises(ConfigError, match=r"got dict; pass UpdateSpec\.of\(update\)"):
        make_codec("int4").bind(COUNTER)  # type: ignore[arg-type]


@pytest.mark.parametrize("base", [b"short", "01234567", bytearray(8), 8])
def test_a_base_is_eight_bytes(base: Any) -> None:
    with pytest.raises(ConfigError, match="base of 8 bytes"):
        make_codec("int4").bind(UpdateSpec((TensorSpec("w", ()),)), base)


@pytest.mark.parametrize("config", [make_codec("rotsign").config, {"kind": "blockquant"}, None, 4])
def test_a_codec_is_made_of_its_own_config(config: Any) -> None:
    if config is None:
        assert BlockQuant(config).config == BlockQuant().config
        return
    with pytest.raises(ConfigError, match="blockquant: expected its config"):
        BlockQuant(config)


def test_a_table_of_a_list_is_the_table_of_the_tuple() -> None:
    rows = [TensorSpec("w", (3,))]
    assert UpdateSpec(rows) == UpdateSpec(tuple(rows))  # type: ignore[arg-type]
    assert hash(UpdateSpec(rows)) == hash(UpdateSpec(tuple(rows)))  # type: ignore[arg-type]
    with pytest.raises(UpdateError, match="specs of tensors"):
        UpdateSpec(("w",))  # type: ignore[arg-type]


# -- what is decoded -------------------------------------------------------------------------------

PAYLOAD = BOUND.encoder.encode({"w.1": torch.ones(3)})


def test_bytes_are_read_before_they_are_decoded_and_the_message_says_so() -> None:
    blob = PAYLOAD.to_bytes()
    for read in (BOUND.decoder.decode, BOUND.read_code, lambda b: BOUND.decoder.decode_mean([b])):
        with pytest.raises(ConfigError, match=r"got bytes; .* pass Payload\.from_bytes\(blob\)"):
            read(blob)  # type: ignore[arg-type]
    assert BOUND.decoder.decode(Payload.from_bytes(blob)).keys() == {"w.1"}


@pytest.mark.parametrize("blob", ["text", None, 3, [1, 2]])
def test_a_payload_is_read_from_bytes(blob: Any) -> None:
    with pytest.raises(ConfigError, match="expected the bytes of a payload"):
        Payload.from_bytes(blob)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "12345678"},
        {"digest": b"1234567"},
        {"base": 8},
        {"base": b""},
        {"digest": None},
        {"codec": "zip"},
        {"codec": ["identity"]},
        {"body": "abc"},
        {"spec": {"w": 1}},
    ],
    ids=str,
)
def test_a_payload_is_made_of_what_it_says(change: dict[str, Any]) -> None:
    (name,) = change
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(PAYLOAD, **change)


@pytest.mark.parametrize("weights", [["a"], [None], [torch.nan], [0], [1, 2], [10**400]])
def test_weights_of_a_mean_are_positive_numbers(weights: Any) -> None:
    with pytest.raises(ConfigError, match="expected 1 positive finite weights") as caught:
        BOUND.decoder.decode_mean([PAYLOAD], weights)
    assert len(str(caught.value)) < 200


def test_a_mean_is_of_any_iterable() -> None:
    mean = BOUND.decoder.decode_mean(iter([PAYLOAD, PAYLOAD]))  # type: ignore[arg-type]
    assert torch.equal(mean["w.1"], BOUND.decoder.decode(PAYLOAD)["w.1"])


@pytest.mark.parametrize("name", LOSSY)
def test_a_code_beyond_fp32_is_refused(name: str) -> None:
    codec = make_codec(name).bind(UpdateSpec((TensorSpec("w", (3,), torch.float64),)))
    with pytest.raises(NonFiniteError, match="3 of 3 are NaN or Inf"):
        codec.write_code(torch.full((3,), 1e300, dtype=torch.float64))
    with pytest.raises(NonFiniteError):
        codec.encoder.encode({"w": torch.full((3,), 1e300, dtype=torch.float64)})


@pytest.mark.parametrize("code", [[1.0, 2.0, 3.0], torch.ones(3, device="meta"), None])
def test_a_code_is_a_tensor(code: Any) -> None:
    with pytest.raises(UpdateError, match="'code': expected a plain dense tensor"):
        BOUND.write_code(code)


@pytest.mark.parametrize("name", [None, 3, ["int4"]])
def test_a_codec_goes_by_a_name(name: Any) -> None:
    with pytest.raises(ConfigError, match="expected a codec"):
        make_codec(name)
    with pytest.raises(ConfigError, match="expected a codec"):
        Codec.from_pretrained(name)


def test_a_name_too_long_for_a_file_is_no_codec() -> None:
    with pytest.raises(HubError, match="expected a bundled codec, a codec's folder") as caught:
        Codec.from_pretrained("a" * 5000)
    assert len(str(caught.value)) < 400
