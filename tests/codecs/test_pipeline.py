"""A transform and a packer in a row: what is looked at once, and what each promises the other."""

import math
from typing import Any

import pytest
import torch
from conformance import bases, model
from torch import Tensor

from gradcodec import layout
from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, Identity, TopK
from gradcodec.errors import ConfigError, MalformedBodyError, NonFiniteError, UpdateError
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.registry import UNTRAINED, make_codec
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import UpdateSpec

SPEC = UpdateSpec.of(model())
SUBSPACE = bases(SPEC, SubspaceConfig(2.0, basis_dtype="float32"), every=1)
LOSSY = [n for n in UNTRAINED if n not in ("fp32", "fp16", "bf16")]


@pytest.mark.parametrize("name", LOSSY)
def test_values_are_looked_at_for_nan_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    check = layout.check_finite

    def counted(vector: Tensor, what: str, room: float = 1.0) -> None:
        looked.append(vector.numel())
        check(vector, what, room)

    monkeypatch.setattr(layout, "check_finite", counted)
    make_codec(name).encoder.encode(model())
    # The values; beside them only scales and what top-k keeps, a fraction of them.
    assert max(looked) == SPEC.numel
    assert sum(looked) < 1.2 * SPEC.numel


@pytest.mark.parametrize("inner", [Identity(), make_codec("fp16"), BlockQuant(), TopK()])
def test_behind_a_transform_every_packer_refuses_nan_by_name(inner: Codec) -> None:
    for bad in (math.nan, math.inf):
        update = model()
        update["square"][3, 5] = bad
        with pytest.raises(NonFiniteError, match=r"chain: 'square'.*1 of 2304"):
            Chain(SUBSPACE, inner).encoder.encode(update)


def test_a_code_beyond_fp32_is_refused_also_where_the_values_are_finite() -> None:
    update = {n: torch.full_like(t, 3e38) for n, t in model().items()}
    for inner in (Identity(), BlockQuant()):
        with pytest.raises(NonFiniteError):
            Chain(SUBSPACE, inner).encoder.encode(update)


def test_a_value_of_fp64_beyond_fp32_is_refused_by_name() -> None:
    update = {"a": torch.ones(3), "b": torch.tensor([1.0, 1e300], dtype=torch.float64)}
    with pytest.raises(NonFiniteError, match="'b' in fp32: expected finite values, 1 of 2"):
        BlockQuant().encoder.encode(update)


@pytest.mark.parametrize("inner", ["int4", BlockQuantConfig(4), None])
def test_a_chain_of_what_is_no_codec_is_refused(inner: Any) -> None:
    with pytest.raises(ConfigError, match="chain: expected two codecs, got"):
        Chain(Identity(), inner)


def test_a_code_of_another_length_is_refused() -> None:
    with pytest.raises(UpdateError, match=r"subspace: expected a code of \d+ values, got 3"):
        SUBSPACE.from_code(torch.zeros(3))


def test_a_chain_is_the_transform_of_one_and_the_packer_of_the_other() -> None:
    inner = BlockQuant(BlockQuantConfig(8))
    chain = Chain(SUBSPACE, inner)
    assert chain.transform is SUBSPACE.transform
    assert chain.packer is inner.packer
    code = SUBSPACE.to_code(model())
    assert bytes(inner.packer.pack(code).tolist()) == chain.encoder.encode(model()).body


def test_a_part_of_a_transform_codes_its_parameter_as_the_whole_does() -> None:
    whole, at = SUBSPACE.to_code(model()), 0
    decoded = SUBSPACE.from_code(whole)
    for t in SPEC:
        part = SUBSPACE.transform.of(t.name)
        assert part is not None
        code = part.code(model()[t.name])
        assert torch.equal(code, whole[at : at + part.code_numel])
        assert torch.equal(part.values(code).view(t.shape), decoded[t.name])
        at += part.code_numel
    assert SUBSPACE.transform.of("no such parameter") is None


@pytest.mark.parametrize("name", UNTRAINED)
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 0.25]])
def test_a_packers_mean_is_the_weighted_sum_of_what_it_unpacks(
    name: str, weights: list[float] | None
) -> None:
    packer, n = make_codec(name).packer, 4097
    generator = torch.Generator().manual_seed(0)
    bodies = torch.stack(
        [packer.pack(torch.randn(n, generator=generator), seed=i) for i in range(3)]
    )
    shares = weights or [1 / 3] * 3
    expected = sum(w * packer.unpack(b, n).double() for w, b in zip(shares, bodies, strict=True))
    error = (packer.mean(bodies, n, weights).double() - expected).norm() / expected.norm()
    assert float(error) < 1e-6


@pytest.mark.parametrize("name", UNTRAINED)
def test_a_packed_vector_shares_no_memory_with_its_input(name: str) -> None:
    packer, x = make_codec(name).packer, torch.randn(300)
    body = packer.pack(x)
    before = body.clone()
    x.zero_()
    assert torch.equal(body, before)


@pytest.mark.parametrize("name", UNTRAINED)
def test_a_body_may_begin_anywhere_in_a_message(name: str) -> None:
    packer = make_codec(name).packer
    body = packer.pack(torch.randn(300), seed=7)
    message = torch.cat([body.new_zeros(3), body])
    assert torch.equal(packer.unpack(message[3:], 300), packer.unpack(body, 300))
    assert torch.equal(packer.mean(message[None, 3:], 300), packer.mean(body[None], 300))


@pytest.mark.parametrize("name", UNTRAINED)
def test_bodies_of_another_length_are_refused_with_both_lengths(name: str) -> None:
    packer = make_codec(name).packer
    body = packer.pack(torch.randn(300))
    for wrong in (body[:-1], torch.cat([body, body[:1]])):
        message = f"expected {len(body)} bytes for 300 values, got {len(wrong)}"
        with pytest.raises(MalformedBodyError, match=message):
            packer.unpack(wrong, 300)
        with pytest.raises(MalformedBodyError, match=message):
            packer.mean(wrong[None], 300)


def test_a_mean_does_not_overflow_where_its_payloads_do_not() -> None:
    codec = BlockQuant(BlockQuantConfig(8)).bind(UpdateSpec.of({"w": torch.ones(300)}))
    payload = codec.encoder.encode({"w": torch.full((300,), 3e38)})
    mean = codec.decoder.decode_mean([payload] * 4)["w"]
    assert torch.allclose(mean, torch.full((300,), 3e38), rtol=1e-2)


def test_a_codec_without_a_table_says_how_to_get_one() -> None:
    codec = BlockQuant()
    for use in (codec.nbytes, codec.code_numel, lambda: codec.from_code(torch.ones(3))):
        with pytest.raises(ConfigError, match=r"not bound to a tensor table; call \.bind\(spec\)"):
            use()
