"""Which side is projected, how dimensions are shared out, and which bases are refused."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec import layout
from gradcodec.codecs import Subspace
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.transforms.subspace.allocate import allocate
from gradcodec.transforms.subspace.config import ALLOCATIONS, SIDES, Axis, SubspaceConfig
from gradcodec.types import TensorSpec, UpdateSpec

FP32 = SubspaceConfig(basis_dtype="float32")


def spec_of(**shapes: tuple[int, ...]) -> UpdateSpec:
    return UpdateSpec(tuple(TensorSpec(n, s) for n, s in shapes.items()))


def spectrum(count: int, seed: int, energy: float = 1.0) -> Tensor:
    """Falling eigenvalues that sum to ``energy``."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, generator=generator, dtype=torch.float64).sort(descending=True)[0]
    return values**3 / (values**3).sum() * energy


def spectra_of(spec: UpdateSpec, config: SubspaceConfig, seed: int = 0) -> dict[str, Tensor]:
    axes = {t.name: Axis.choose(t, config) for t in spec if t.numel}
    return {
        n: spectrum(a.size, seed + i, 10.0 ** ((seed + i) % 4))
        for i, (n, a) in enumerate(axes.items())
    }


def spent(spec: UpdateSpec, ranks: dict[str, int], config: SubspaceConfig) -> int:
    """Code values of these ranks."""
    return sum(ranks[t.name] * Axis.choose(t, config).other for t in spec if t.numel)


# -- the projected side --------------------------------------------------------------------------

LONG, SHORT = (SubspaceConfig(4.0, side=side) for side in ("long", "short"))
AUTO = SubspaceConfig(4.0)


@pytest.mark.parametrize(
    ("shape", "config", "axis"),
    [
        pytest.param((8, 96), LONG, Axis(False, 96, 8), id="LoRA A, long"),
        pytest.param((96, 8), LONG, Axis(True, 96, 8), id="LoRA B, long"),
        pytest.param((8, 96), SHORT, Axis(True, 8, 96), id="LoRA A, short"),
        pytest.param((96, 8), SHORT, Axis(False, 8, 96), id="LoRA B, short"),
        # 8 / 4 leaves the two dimensions that the short side needs, 7 / 4 does not.
        pytest.param((8, 96), AUTO, Axis(True, 8, 96), id="LoRA A of rank 8, auto"),
        pytest.param((7, 96), AUTO, Axis(False, 96, 7), id="LoRA A of rank 7, auto"),
        pytest.param((96, 7), AUTO, Axis(True, 96, 7), id="LoRA B of rank 7, auto"),
        pytest.param((48, 48), LONG, Axis(True, 48, 48), id="square, long"),
        pytest.param((48, 48), SHORT, Axis(True, 48, 48), id="square, short"),
        pytest.param((4096, 64), AUTO, Axis(False, 64, 4096), id="embedding, auto"),
        pytest.param((4096, 64), LONG, Axis(True, 4096, 64), id="embedding, long"),
        pytest.param((65,), AUTO, Axis(True, 65, 1), id="bias, auto"),
        pytest.param((65,), SHORT, Axis(False, 1, 65), id="bias, short"),
        pytest.param((), AUTO, Axis(True, 1, 1), id="scalar"),
        pytest.param((64, 5, 3, 3), AUTO, Axis(False, 45, 64), id="convolution, auto"),
        pytest.param((6, 5, 3, 3), LONG, Axis(False, 45, 6), id="convolution, long"),
    ],
)
def test_the_side_of(shape: tuple[int, ...], config: SubspaceConfig, axis: Axis) -> None:
    assert Axis.choose(TensorSpec("w", shape), config) == axis


def test_min_rank_sends_auto_to_the_long_side() -> None:
    config = SubspaceConfig(4.0, min_rank=3)
    assert Axis.choose(TensorSpec("w", (8, 96)), config).size == 96
    assert Axis.choose(TensorSpec("w", (12, 96)), config).size == 12


@given(st.lists(st.integers(1, 9), max_size=4).map(tuple), st.sampled_from(SIDES))
def test_the_sides_make_the_whole_matrix(shape: tuple[int, ...], side: str) -> None:
    spec = TensorSpec("w", shape)
    axis = Axis.choose(spec, SubspaceConfig(2.0, side=side))
    sides = (axis.size, axis.other) if axis.left else (axis.other, axis.size)
    assert sides == layout.matrix_shape(spec)


# -- allocation ----------------------------------------------------------------------------------

SHAPES = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=5).map(
    lambda shapes: spec_of(**{f"w{i}": s for i, s in enumerate(shapes)})
)


@given(SHAPES, st.sampled_from(["energy", "tempered"]), st.floats(1, 8), st.integers(0, 9))
def test_the_budget_is_never_exceeded(
    spec: UpdateSpec, allocation: str, ratio: float, seed: int
) -> None:
    config = SubspaceConfig(ratio, allocation, side="long")
    try:
        ranks = allocate(spec, spectra_of(spec, config, seed), config)
    except ConfigError:
        least = sum(Axis.choose(t, config).other for t in spec)
        assert least > spec.numel / ratio
        return
    assert spent(spec, ranks, config) <= budget(spec, ratio)


def budget(spec: UpdateSpec, ratio: float) -> float:
    """Elements that may be spent; 33 / 1.1 is a little less than 30 in floating point."""
    return spec.numel / ratio * (1 + 1e-12)


@given(SHAPES, st.floats(1, 8), st.integers(1, 3))
def test_uniform_gives_each_side_its_share_or_min_rank(
    spec: UpdateSpec, ratio: float, min_rank: int
) -> None:
    config = SubspaceConfig(ratio, "uniform", side="long", min_rank=min_rank)
    ranks = allocate(spec, spectra_of(spec, config), config)
    sizes = {t.name: Axis.choose(t, config).size for t in spec}
    assert ranks == {n: min(s, max(min_rank, int(s / ratio))) for n, s in sizes.items()}


@given(SHAPES, st.floats(1, 4))
def test_uniform_keeps_the_budget_where_sides_are_long_enough(
    spec: UpdateSpec, ratio: float
) -> None:
    config = SubspaceConfig(ratio, "uniform", side="long")
    ranks = allocate(spec, spectra_of(spec, config), config)
    if all(Axis.choose(t, config).size >= ratio for t in spec):
        assert spent(spec, ranks, config) <= budget(spec, ratio)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("min_rank", [1, 2, 5])
def test_everyone_gets_min_rank(allocation: str, min_rank: int) -> None:
    spec = spec_of(loud=(64, 8), quiet=(64, 8), bias=(65,))
    config = SubspaceConfig(4.0, allocation, min_rank=min_rank, side="long")
    spectra = spectra_of(spec, config)
    spectra["quiet"] = spectra["quiet"] * 1e-9
    ranks = allocate(spec, spectra, config)
    assert min(ranks.values()) >= min_rank


def test_a_min_rank_over_the_budget_is_refused() -> None:
    spec = spec_of(w=(8, 8))
    config = SubspaceConfig(8.0, "energy", min_rank=2)
    with pytest.raises(ConfigError, match=r"16 code values .* min_rank=2.* allows 8"):
        allocate(spec, spectra_of(spec, config), config)


def kept(ranks: dict[str, int], spectra: dict[str, Tensor]) -> float:
    """Energy of the dimensions that are kept."""
    return sum(float(spectra[n][:k].sum()) for n, k in ranks.items())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ratio", [1.5, 2.0, 4.0])
def test_energy_is_optimal(seed: int, ratio: float) -> None:
    # Equal costs per dimension: the greedy choice is the best one of all, by trying them all.
    spec = spec_of(a=(6, 3), b=(3, 7), c=(5, 3))
    config = SubspaceConfig(ratio, "energy", side="long")
    spectra = spectra_of(spec, config, seed)
    choices = itertools.product(*(range(1, len(spectra[t.name]) + 1) for t in spec))
    every = [dict(zip(("a", "b", "c"), c, strict=True)) for c in choices]
    allowed = [r for r in every if spent(spec, r, config) <= budget(spec, ratio)]
    best = max(kept(r, spectra) for r in allowed)
    ranks = allocate(spec, spectra, config)
    # Sums in another order differ by fp64 noise.
    assert kept(ranks, spectra) == pytest.approx(best, rel=1e-12)
    assert min(kept(r, spectra) for r in allowed) < best


def test_energy_counts_per_code_value() -> None:
    # The wide parameter's dimensions hold twice the energy at four times the cost.
    spec = spec_of(wide=(16, 8), slim=(16, 2))
    config = SubspaceConfig(4.0, "energy", side="long")
    spectra = {"wide": torch.full((16,), 2.0), "slim": torch.full((16,), 1.0)}
    assert allocate(spec, spectra, config) == {"wide": 1, "slim": 16}


@pytest.mark.parametrize("temper", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_tempered_lies_between_relative_and_energy(temper: float) -> None:
    spec = spec_of(loud=(32, 4), quiet=(32, 4))
    spectra = {"loud": spectrum(32, 0, 100.0), "quiet": spectrum(32, 1, 1.0)}

    def loud(config: SubspaceConfig) -> int:
        return allocate(spec, spectra, config)["loud"]

    relative = loud(SubspaceConfig(4.0, "tempered", temper=0.0, side="long"))
    energy = loud(SubspaceConfig(4.0, "energy", side="long"))
    assert relative < energy
    assert relative <= loud(SubspaceConfig(4.0, "tempered", temper=temper, side="long")) <= energy


def test_tempered_at_one_is_energy() -> None:
    spec = spec_of(loud=(32, 4), quiet=(32, 4))
    config = SubspaceConfig(4.0, "tempered", temper=1.0, side="long")
    spectra = spectra_of(spec, config)
    energy = allocate(spec, spectra, SubspaceConfig(4.0, "energy", side="long"))
    assert allocate(spec, spectra, config) == energy


def test_tempered_at_zero_ignores_the_scale_of_a_parameter() -> None:
    spec = spec_of(loud=(32, 4), quiet=(32, 4))
    config = SubspaceConfig(4.0, "tempered", temper=0.0, side="long")
    # Powers of two, so that dividing by the total is exact.
    spectra = {"loud": spectrum(32, 0), "quiet": spectrum(32, 1)}
    louder = {**spectra, "loud": spectra["loud"] * 1024}
    assert allocate(spec, louder, config) == allocate(spec, spectra, config)


def test_dimensions_without_energy_are_not_bought() -> None:
    spec = spec_of(w=(16, 2))
    config = SubspaceConfig(1.0, "energy", side="long")
    values = torch.cat([torch.ones(3), torch.zeros(13)])
    assert allocate(spec, {"w": values}, config) == {"w": 3}


def test_a_short_spectrum_is_the_limit() -> None:
    # A sketched side knows fewer directions than it has.
    spec = spec_of(w=(16, 2))
    for allocation in ALLOCATIONS:
        config = SubspaceConfig(2.0, allocation, side="long")
        assert allocate(spec, {"w": torch.ones(4)}, config) == {"w": 4}


def test_empty_parameters_get_nothing() -> None:
    spec = spec_of(w=(8, 2), none=(0, 4))
    assert set(allocate(spec, {"w": torch.ones(8)}, SubspaceConfig(2.0, side="long"))) == {"w"}


# -- settings and bases --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "bad"),
    [
        ("ratio", [0.5, 0, -1, math.nan, math.inf, None, "64"]),
        ("allocation", ["greedy", "", None]),
        ("temper", [-0.1, 1.1, math.nan, None, "0.5"]),
        ("side", ["left", "", None]),
        ("min_rank", [0, -1, 1.5, None, "1"]),
        ("basis_dtype", ["float64", "int2", None]),
        ("share", ["layers", "", None]),
    ],
)
def test_bad_settings_are_named(setting: str, bad: list[object]) -> None:
    for value in bad:
        with pytest.raises(ConfigError, match=setting):
            SubspaceConfig(**{setting: value})


SPEC = spec_of(w=(6, 4), b=(5,))


def test_a_spec_is_needed() -> None:
    with pytest.raises(ConfigError, match="spec"):
        Subspace(SubspaceConfig())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("shared.left.w", (4, 2), id="the other side's length"),
        pytest.param("shared.right.w", (6, 2), id="the other side's length, right"),
        pytest.param("shared.left.w", (6, 7), id="more columns than rows"),
        pytest.param("shared.left.w", (6,), id="a vector"),
        pytest.param("shared.left.w", (6, 2, 1), id="three dimensions"),
        pytest.param("shared.left.b", (1, 1), id="a bias is a column"),
    ],
)
def test_a_basis_that_does_not_fit_is_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=f"basis of {name[-1]}: float32"):
        Subspace(FP32, spec=SPEC, weights={name: torch.zeros(shape)})


@pytest.mark.parametrize("name", ["shared.left.v", "shared.up.w", "w"])
def test_a_basis_of_nothing_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown parameters.*{name}"):
        Subspace(FP32, spec=SPEC, weights={name: torch.zeros(6, 2)})


def test_two_bases_of_one_parameter_are_refused() -> None:
    weights = {"shared.left.w": torch.zeros(6, 2), "shared.right.w": torch.zeros(4, 2)}
    with pytest.raises(ConfigError, match=r"w: float32.* either side"):
        Subspace(FP32, spec=SPEC, weights=weights)


def test_the_side_is_part_of_a_square_matrixs_basis() -> None:
    spec, u = spec_of(w=(6, 6)), torch.linalg.qr(torch.randn(6, 2))[0]
    config = SubspaceConfig(3.0, basis_dtype="float32")
    codecs = [
        Subspace.from_bases(config, spec, {"w": (Axis(left, 6, 6), u)}) for left in (True, False)
    ]
    assert codecs[0].digest != codecs[1].digest
    assert [c.transform.parts["w"].code_shape for c in codecs] == [(2, 6), (6, 2)]


def test_the_code_is_the_projection_in_row_major_order() -> None:
    g, u = torch.randn(6, 4), torch.linalg.qr(torch.randn(6, 2))[0]
    config = SubspaceConfig(3.0, basis_dtype="float32")
    codec = Subspace.from_bases(config, SPEC, {"w": (Axis(True, 6, 4), u)})
    assert torch.equal(codec.to_code({"w": g, "b": torch.zeros(5)}), (u.T @ g).flatten())


def test_a_projection_is_idempotent() -> None:
    u = torch.linalg.qr(torch.randn(6, 2))[0]
    config = SubspaceConfig(3.0, basis_dtype="float32")
    codec = Subspace.from_bases(config, SPEC, {"w": (Axis(True, 6, 4), u)})
    once = codec.from_code(codec.to_code({"w": torch.randn(6, 4), "b": torch.randn(5)}))
    # Measured up to 7e-7 over 50 draws of values of order 1.
    assert torch.allclose(codec.from_code(codec.to_code(once))["w"], once["w"], atol=3e-6)


def test_a_parameter_without_a_basis_comes_back_zero() -> None:
    codec = Subspace.from_bases(
        SubspaceConfig(3.0), SPEC, {"w": (Axis(True, 6, 4), torch.eye(6)[:, :2])}
    )
    payload = codec.encoder.encode({"w": torch.ones(6, 4), "b": torch.ones(5)})
    assert codec.decoder.decode(payload)["b"].tolist() == [0] * 5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_parameter_may_have_a_basis(side: str, shape: tuple[int, int]) -> None:
    size = shape[0] if side == "left" else shape[1]
    weights = {f"shared.{side}.w": torch.zeros(size, min(size, 2))}
    codec = Subspace(FP32, spec=spec_of(w=shape), weights=weights)
    decoded = codec.decoder.decode(codec.encoder.encode({"w": torch.zeros(shape)}))
    assert decoded["w"].shape == shape


def test_a_basis_of_no_columns_has_no_step_scales() -> None:
    codec = Subspace(FP32, spec=SPEC, weights={"shared.left.w": torch.zeros(6, 0)})
    assert codec.transform.step_scales().numel() == codec.code_numel(SPEC) == 0


def test_another_table_is_refused() -> None:
    codec = Subspace(SubspaceConfig(), spec=SPEC)
    with pytest.raises(UpdateError, match="another tensor table"):
        codec.from_code(torch.zeros(0), spec_of(w=(6, 4)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bases_are_stored_as_configured(dtype: str) -> None:
    config = SubspaceConfig(3.0, basis_dtype=dtype)
    codec = Subspace.from_bases(config, SPEC, {"w": (Axis(True, 6, 4), torch.eye(6)[:, :2])})
    assert codec.weight_nbytes == 12 * getattr(torch, dtype).itemsize
