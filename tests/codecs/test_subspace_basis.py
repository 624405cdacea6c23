"""Bases in 8 and 4 bits: sizes, error, exactness, and codecs made of them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec import describe
from gradcodec.codec import Codec
from gradcodec.codecs import Subspace
from gradcodec.errors import ConfigError, HubError
from gradcodec.transforms.subspace.basis import (
    BASIS_DTYPES,
    BITS,
    BLOCK,
    FLOATS,
    dequantise,
    quantise,
)
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import TensorSpec, UpdateSpec

SPEC = UpdateSpec(
    (TensorSpec("A", (8, 200)), TensorSpec("B", (131, 8)), TensorSpec("scales.A", (70, 3)))
)
RANKS = {"A": 6, "B": 5, "scales.A": 4}


def orthonormal(size: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, k, generator=generator))[0]


def made(dtype: str) -> Subspace:
    """A codec of random bases; one of its parameters has a name made to be mistaken."""
    config = SubspaceConfig(8.0, side="long", basis_dtype=dtype)
    axes = {t.name: Axis.choose(t, config) for t in SPEC}
    bases = {n: (a, orthonormal(a.size, RANKS[n])) for n, a in axes.items()}
    return Subspace.from_bases(config, SPEC, bases)


def update(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {t.name: torch.randn(t.shape, generator=generator) for t in SPEC}


# -- one basis -----------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(0, 9), st.sampled_from([4, 8]), st.integers(0, 9))
def test_every_value_is_within_half_a_step_of_its_block(
    size: int, k: int, bits: int, seed: int
) -> None:
    u = torch.randn(size, k, generator=torch.Generator().manual_seed(seed))
    codes, scales = quantise(u, bits)
    came = dequantise(codes, scales, size, bits)
    assert came.shape == u.shape
    assert codes.numel() + 2 * scales.numel() == stored_nbytes(size, k, f"int{bits}")
    steps = scales.float().repeat_interleave(BLOCK, 1)[:, :size].T
    # A bf16 scale is off by 2^-9: the largest value of a block, by 2^-9 of its 7 or 127 steps.
    top = (1 << (bits - 1)) - 1
    assert bool(((came - u).abs() <= steps * (0.5 + top * 2**-8)).all())


@pytest.mark.parametrize(("dtype", "low", "high"), [("int8", 2e-3, 8e-3), ("int4", 0.06, 0.13)])
@pytest.mark.parametrize("size", [256, 300, 4096])
def test_the_relative_error_is_in_its_window(
    dtype: str, low: float, high: float, size: int
) -> None:
    # Near normal values, E[max^2] of 64 is 6.1: sqrt(6.1 / 12) / 127 = 0.0056 and / 7 = 0.102.
    u = orthonormal(size, 16)
    came = dequantise(*quantise(u, BITS[dtype]), size, BITS[dtype])
    assert low < float((came - u).norm() / u.norm()) < high


@pytest.mark.parametrize("bits", [4, 8])
def test_columns_are_quantised_on_their_own(bits: int) -> None:
    u = orthonormal(77, 4) * torch.tensor([1.0, 1e-3, 1e3, 0.0])
    whole = dequantise(*quantise(u, bits), 77, bits)
    for j in range(4):
        one = dequantise(*quantise(u[:, j : j + 1], bits), 77, bits)
        assert torch.equal(one[:, 0], whole[:, j])
    assert float(whole[:, 3].abs().max()) == 0


def stored_nbytes(size: int, k: int, dtype: str) -> int:
    """Bytes of a basis ``[size, k]``: values, or whole bytes of codes and a scale per block."""
    if dtype in FLOATS:
        return size * k * FLOATS[dtype].itemsize
    return k * (-(-size * BITS[dtype] // 8) + 2 * -(-size // BLOCK))


@pytest.mark.parametrize(
    ("size", "bits", "expected"), [(4096, 4, 2048 + 128), (4096, 8, 4096 + 128), (65, 4, 33 + 4)]
)
def test_a_column_takes_its_codes_and_two_bytes_per_64(size: int, bits: int, expected: int) -> None:
    codes, scales = quantise(torch.ones(size, 3), bits)
    assert codes.numel() + 2 * scales.numel() == 3 * expected


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda c, s: (c[:, :-1], s), id="short codes"),
        pytest.param(lambda c, s: (c.int(), s), id="codes of another dtype"),
        pytest.param(lambda c, s: (c.flatten(), s), id="flat codes"),
        pytest.param(lambda c, s: (c, None), id="no scales"),
        pytest.param(lambda c, s: (c, s.float()), id="scales of another dtype"),
        pytest.param(lambda c, s: (c, s[:-1]), id="scales of fewer columns"),
        pytest.param(lambda c, s: (c, -s), id="negative scales"),
        pytest.param(lambda c, s: (c, s * float("nan")), id="NaN"),
    ],
)
def test_what_cannot_be_a_basis_is_refused(bits: int, spoil) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="expected"):
        dequantise(*spoil(*quantise(orthonormal(70, 3), bits)), 70, bits)


# -- codecs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BASIS_DTYPES)
def test_stored_bytes_are_those_of_the_formula(dtype: str) -> None:
    codec = made(dtype)
    sizes = {n: axis.size for n, (axis, _) in codec.bases().items()}
    assert codec.weight_nbytes == sum(stored_nbytes(sizes[n], RANKS[n], dtype) for n in RANKS)
    assert {n: u.shape[1] for n, (_, u) in codec.bases().items()} == RANKS


@pytest.mark.parametrize("dtype", BASIS_DTYPES)
def test_both_ends_are_tied_exactly(dtype: str) -> None:
    codec = made(dtype)
    g, z = update(), torch.randn(codec.code_numel(SPEC))
    left = float(codec.to_code(g).double() @ z.double())
    decoded = codec.from_code(z)
    right = sum(float((g[n].double() * decoded[n].double()).sum()) for n in g)
    # <U^T g, z> = <g, U z> up to fp32 sums; both are of order sqrt(m) = 10.
    assert left == pytest.approx(right, abs=2e-5)
    for name, (axis, u) in codec.bases().items():
        dense = u.float() if axis.left else u.float().T
        part = codec.from_code(codec.to_code({n: t * (n == name) for n, t in g.items()}))[name]
        expected = dense @ (dense.T @ g[name]) if axis.left else (g[name] @ dense.T) @ dense
        assert torch.allclose(part, expected, atol=1e-5)


@pytest.mark.parametrize(("dtype", "low", "high"), [("int8", 2e-5, 2e-4), ("int4", 0.01, 0.04)])
def test_decoded_updates_differ_a_little_from_those_of_the_float_codec(
    dtype: str, low: float, high: float
) -> None:
    # U_q U_q^T g - U U^T g is the error of U twice, for white g: 6e-5 and 0.02 of the energy.
    off = total = 0.0
    codec, exact = made(dtype), made("float32")
    for seed in range(20):
        ours, theirs = (c.from_code(c.to_code(update(seed))) for c in (codec, exact))
        off += sum(float((ours[n] - theirs[n]).square().sum()) for n in ours)
        total += sum(float(t.square().sum()) for t in theirs.values())
    assert low < off / total < high


@pytest.mark.parametrize("dtype", BASIS_DTYPES)
def test_a_saved_codec_is_the_same_and_either_half_will_do(dtype: str, tmp_path: Path) -> None:
    codec = made(dtype)
    codec.save_pretrained(tmp_path)
    payload = codec.encoder.encode(update())
    for half in (None, "encoder", "decoder"):
        loaded = Codec.from_pretrained(tmp_path, half=half)
        assert loaded.digest == codec.digest
        assert loaded.weight_nbytes == codec.weight_nbytes
        assert loaded.encoder.encode(update()) == payload
        for name, tensor in loaded.decoder.decode(payload).items():
            assert torch.equal(tensor, codec.decoder.decode(payload)[name])


def test_storages_are_other_codecs() -> None:
    assert len({made(dtype).digest for dtype in BASIS_DTYPES}) == len(BASIS_DTYPES)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_moved_and_bound_codecs_keep_their_bases(dtype: str) -> None:
    codec = made(dtype)
    for other in (codec.to("cpu"), codec.bind(SPEC, base=bytes(8))):
        assert other.weight_nbytes == codec.weight_nbytes
        for name, (axis, u) in other.bases().items():
            assert axis == codec.bases()[name][0]
            assert torch.equal(u, codec.bases()[name][1])


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_inspect_counts_what_is_stored(dtype: str, tmp_path: Path) -> None:
    made(dtype).save_pretrained(tmp_path)
    rows = describe.codec(str(tmp_path))
    assert f"basis_dtype='{dtype}'" in rows["codec"]
    assert rows["weights"].startswith(f"6 tensors, {made(dtype).weight_nbytes:,} bytes")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_codec_without_its_scales_is_named(dtype: str) -> None:
    codec = made(dtype)
    weights = {n: t for n, t in codec.weights.items() if n != "shared.left_scales.B"}
    with pytest.raises(ConfigError, match=r"basis of B: float32.* bfloat16 scales .* got none"):
        Subspace(codec.config, spec=SPEC, weights=weights)
    more = {**codec.weights, "shared.left_scales.other": torch.zeros(1, 1)}
    with pytest.raises(ConfigError, match=r"unknown parameters.*shared\.left_scales\.other"):
        Subspace(codec.config, spec=SPEC, weights=more)


def test_a_flipped_scale_is_found_on_loading(tmp_path: Path) -> None:
    codec = made("int4")
    codec.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    blob = bytearray(path.read_bytes())
    blob[-1] ^= 1
    path.write_bytes(blob)
    with pytest.raises(HubError, match="altered"):
        Codec.from_pretrained(tmp_path)
