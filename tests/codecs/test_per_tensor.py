"""Laws of ``PerTensor``: it is its parts side by side, as file, as payload and as training code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, Identity, Subspace
from gradcodec.errors import ConfigError, MalformedBodyError, UpdateError
from gradcodec.faf import LatentOptimizer
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.per_tensor import MAX_PARTS, PerTensor, PerTensorConfig
from gradcodec.registry import make_codec
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import UpdateSpec

UPDATE = {
    "a": torch.linspace(-1, 1, 48).view(8, 6),
    "count": torch.tensor([3, 2**40]),
    "b": torch.linspace(2, 3, 30).view(5, 6),
}
SPEC = UpdateSpec.of(UPDATE)


def subspace(name: str = "a") -> Subspace:
    t = next(t for t in SPEC if t.name == name)
    u = torch.linalg.qr(torch.randn(t.shape[0], 2, generator=torch.Generator().manual_seed(0)))[0]
    axis = Axis(True, t.shape[0], t.shape[1])
    config = SubspaceConfig(ratio=2, basis_dtype="float32")
    return Subspace.from_bases(config, UpdateSpec((t,)), {name: (axis, u)})


def fitted() -> PerTensor:
    """A fitted transform with a quantiser, integers bit for bit, and a quantised rest."""
    groups: list[tuple[Codec, list[str]]] = [
        (Chain(subspace(), BlockQuant(BlockQuantConfig(8, block=8))), ["a"]),
        (Identity(), ["count"]),
        (make_codec("int4"), ["b"]),
    ]
    return PerTensor.of(SPEC, groups)


def test_each_tensor_is_what_its_own_codec_makes_of_it() -> None:
    codec = fitted()
    decoded = codec.decoder.decode(codec.encoder.encode(UPDATE, seed=3))
    assert list(decoded) == list(UPDATE)
    for part in codec.parts:
        alone = {t.name: UPDATE[t.name] for t in part.spec or ()}
        for name, t in part.decoder.decode(part.encoder.encode(alone, seed=3)).items():
            assert torch.equal(decoded[name], t)
    assert torch.equal(decoded["count"], UPDATE["count"])


def test_its_body_is_as_long_as_those_of_its_parts() -> None:
    codec = fitted()
    assert len(codec.encoder.encode(UPDATE).body) == sum(p.nbytes() for p in codec.parts)


def test_a_folder_brings_it_back(tmp_path: Path) -> None:
    codec = fitted()
    codec.save_pretrained(tmp_path)
    again = Codec.from_pretrained(tmp_path)
    assert again.digest == codec.digest
    payload = codec.encoder.encode(UPDATE)
    for name, t in again.decoder.decode(payload).items():
        assert torch.equal(t, codec.decoder.decode(payload)[name])


def test_rebinding_reaches_its_parts() -> None:
    codec = fitted().bind(SPEC, b"baseBASE")
    assert codec.base == b"baseBASE"
    assert codec.digest == fitted().digest


def test_training_in_its_code_space_moves_every_tensor() -> None:
    spec = UpdateSpec.of({n: t for n, t in UPDATE.items() if n != "count"})
    codec = PerTensor.of(spec, [(subspace(), ["a"]), (Identity(), ["b"])])
    parameters = {t.name: nn.Parameter(UPDATE[t.name].clone()) for t in spec}
    start = {n: p.detach().clone() for n, p in parameters.items()}
    optimizer = LatentOptimizer(parameters, codec, torch.optim.AdamW, lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        sum(p.square().sum() for p in parameters.values()).backward()
        optimizer.step()
    sent = codec.decoder.decode(optimizer.payload())
    for name, p in parameters.items():
        assert float((p - start[name]).norm()) > 0.1
        assert torch.allclose(start[name] + sent[name], p, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([(Identity(), ["a", "b"])], "'count' is in no group"),
        ([(subspace(), ["a", "b"]), (Identity(), ["count"])], "was made for 1 tensors"),
        (
            [(subspace(), ["a"]), (subspace("b"), ["b"]), (Identity(), ["count"])],
            "at most one part with learned weights",
        ),
        ([(fitted(), ["a", "b", "count"])], "expected parts of other kinds"),
    ],
    ids=["missing", "of others", "two learned", "nested"],
)
def test_groups_that_do_not_fit_are_named(groups: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PerTensor.of(SPEC, groups)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"part_of": [0, 1]}, "a part for each of 3 tensors"),
        ({"part_of": [0, 1, 9]}, r"part_of within 0\.\.2"),
        ({"part_of": [0, 1, True]}, r"part_of within 0\.\.2"),
        ({"part_of": None}, "expected two lists"),
        ({"parts": []}, "expected 1"),
        ({"parts": [{"kind": "identity"}] * (MAX_PARTS + 1)}, "expected 1"),
        ({"parts": [{"kind": "per_tensor"}] * 3}, "of other kinds"),
        ({"parts": ["identity"] * 3}, "expected a codec kind"),
        ({"extra": 1}, "expected keys"),
    ],
)
def test_a_config_that_makes_none_is_named(change: dict[str, Any], message: str) -> None:
    codec = PerTensor.of(SPEC, [(Identity(), ["a"]), (Identity(), ["count"]), (Identity(), ["b"])])
    with pytest.raises(ConfigError, match=message):
        PerTensor.from_config({**codec.config.to_dict(), **change}, spec=SPEC)


def test_it_codes_named_tensors_only() -> None:
    codec = fitted()
    with pytest.raises(ConfigError, match="named tensors"):
        codec.packer.nbytes(7)
    with pytest.raises(ConfigError, match="a spec is needed"):
        PerTensor.from_config(codec.config.to_dict())
    with pytest.raises(UpdateError):
        codec.encoder.encode({"a": UPDATE["a"]})
    payload = codec.encoder.encode(UPDATE)
    with pytest.raises(MalformedBodyError):
        codec.pipeline.decode(payload.body[:-1], SPEC)


def test_config_comes_back_from_its_dict() -> None:
    config = fitted().config
    assert config.to_dict()["part_of"] == [0, 1, 2]
    with pytest.raises(ConfigError, match="expected 1"):
        PerTensorConfig((), ())
