"""Laws of streaming second moments: exact ones are exact, sketches obey their bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.errors import ConfigError, NonFiniteError, UpdateError
from gradcodec.tgap.moments import EXACT_LIMIT, ExactMoment, SecondMoments, SketchedMoment
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import TensorSpec, UpdateSpec

EPS = torch.finfo(torch.float32).eps


def stream(count: int, size: int, *, decay: float = 0.0, seed: int = 0) -> Tensor:
    """Rows with a spectrum that falls off by ``exp(-decay j)``."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    scales = torch.exp(-decay * torch.arange(size))
    return torch.randn(count, size, generator=generator) * scales @ mixing


@given(
    st.lists(st.integers(1, 6), min_size=0, max_size=4),
    st.sampled_from(["long", "short", "auto"]),
    st.integers(1, 4),
)
def test_an_exact_moment_is_the_naive_float64_sum(shape: list[int], side: str, steps: int) -> None:
    spec = UpdateSpec((TensorSpec("w", tuple(shape)),))
    moments = SecondMoments(spec, SubspaceConfig(ratio=1, side=side))
    axis = moments.axes["w"]
    total = bound = torch.zeros(axis.size, axis.size, dtype=torch.float64)
    for _ in range(steps):
        g = torch.randn(shape)
        moments.add({"w": g})
        m = g.double().reshape(shape[0] if len(shape) > 1 else g.numel(), -1)
        m = m if axis.left else m.T
        total, bound = total + m @ m.T, bound + m.abs() @ m.abs().T
    moment = moments._moments["w"]
    assert isinstance(moment, ExactMoment)
    terms = steps * axis.other + 1
    assert bool(((moment.sum.double() - total).abs() <= terms * EPS * bound).all())


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("rows", [4, 12])
def test_frequent_directions_obeys_its_bound_and_is_no_copy(decay: float, rows: int) -> None:
    size = 40
    data = stream(300, size, decay=decay)
    sketch = SketchedMoment(size, rows)
    sketch.add(data)
    exact = data.double().T @ data.double()
    kept = sketch.buffer.double()
    gap = torch.linalg.eigvalsh(exact - kept.T @ kept)
    energies = torch.linalg.eigvalsh(exact).flip(0)
    tails = [float(energies[k:].sum()) / (rows - k) for k in range(rows)]
    rounding = 300 * EPS * float(energies[0])
    assert float(gap.min()) >= -rounding
    assert 0 < float(gap.max()) <= min(tails) + rounding


def test_a_direction_that_grows_slowly_is_not_overlooked() -> None:
    """What keeping the largest directions of each batch would lose for ever."""
    rows = torch.eye(6)
    sketch = SketchedMoment(6, 4)
    sketch.add(10 * rows[:4])
    for _ in range(2000):
        sketch.add(rows[4:5])
    # Energies are 2000 and four times 100: with k = 1 at most 400 / (4 - 1) may be missing.
    values, vectors = sketch.top(1)
    assert 2000 - 400 / 3 <= float(values[0]) <= 2000 * (1 + 1e-3)
    assert float(vectors[4, 0]) == pytest.approx(1)


def test_a_sketch_of_few_directions_loses_nothing() -> None:
    basis = torch.linalg.qr(torch.randn(50, 5)).Q
    data = torch.randn(200, 5) @ basis.T
    sketch = SketchedMoment(50, 6)
    sketch.add(data)
    values, vectors = sketch.top(5)
    wanted = torch.linalg.svdvals(data.double()) ** 2
    assert torch.allclose(values, wanted[:5], rtol=200 * EPS, atol=0)
    outside = vectors - basis.double() @ (basis.double().T @ vectors)
    assert float(outside.norm()) < 200 * EPS


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_a_sketch_does_not_depend_on_how_rows_arrive(cuts: list[int]) -> None:
    data = stream(sum(cuts), 24, decay=0.2)
    whole, parts = SketchedMoment(24, 3), SketchedMoment(24, 3)
    whole.add(data)
    for piece in torch.split(data, cuts):
        parts.add(piece)
    assert torch.equal(whole.buffer, parts.buffer)


def test_memory_does_not_grow_with_steps() -> None:
    spec = UpdateSpec((TensorSpec("exact", (8, 3)), TensorSpec("long", (EXACT_LIMIT + 1, 2))))
    moments = SecondMoments(spec, SubspaceConfig(ratio=1024, side="long"))

    def numel() -> int:
        held = [v for m in moments._moments.values() for v in vars(m).values()]
        return sum(v.numel() for v in held if isinstance(v, Tensor))

    assert isinstance(moments._moments["long"], SketchedMoment)
    before = numel()
    for _ in range(30):
        moments.add({t.name: torch.randn(t.shape) for t in spec})
    assert numel() == before


@pytest.mark.parametrize("kind", [ExactMoment, lambda n: SketchedMoment(n, 6)])
def test_eigenvectors_are_orthonormal_signed_and_sorted(kind: object) -> None:
    moment = kind(20)  # type: ignore[operator]
    moment.add(stream(100, 20, decay=0.2))
    values, vectors = moment.top(6)
    assert bool((values[:-1] >= values[1:]).all())
    assert bool((values >= 0).all())
    eye = torch.eye(vectors.shape[1], dtype=torch.float64)
    assert torch.allclose(vectors.T @ vectors, eye, atol=1e-12)
    assert bool((vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all())


def test_a_sketch_that_saw_nothing_has_no_directions() -> None:
    values, vectors = SketchedMoment(10, 3).top(3)
    assert values.numel() == vectors.numel() == 0


def test_missing_tensors_count_as_zero() -> None:
    spec = UpdateSpec((TensorSpec("a", (3, 2)), TensorSpec("b", (4,)), TensorSpec("none", (0, 2))))
    moments = SecondMoments(spec, SubspaceConfig(ratio=1))
    moments.add({"a": torch.ones(3, 2)})
    moments.add({"none": torch.ones(0, 2)})
    assert moments.count == 2
    assert not moments._moments["b"].sum.any()  # type: ignore[attr-defined]
    assert set(moments.spectra()) == {"a", "b"}


@pytest.mark.parametrize(
    ("update", "error", "message"),
    [
        ({"a": torch.ones(3, 2), "c": torch.ones(1)}, UpdateError, "'c'"),
        ({"a": torch.ones(3, 2), "b": torch.ones(3)}, UpdateError, r"b: float32\[4\]"),
        ({"a": torch.ones(3, 2), "b": torch.full((4,), torch.nan)}, NonFiniteError, "b: "),
        ({"a": torch.ones(3, 2), "b": torch.full((4,), -torch.inf)}, NonFiniteError, "b: "),
    ],
)
def test_a_bad_update_is_named_and_changes_nothing(
    update: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    spec = UpdateSpec((TensorSpec("a", (3, 2)), TensorSpec("b", (4,))))
    moments = SecondMoments(spec, SubspaceConfig(ratio=1))
    with pytest.raises(error, match=message):
        moments.add(update)
    assert moments.count == 0
    assert not any(m.sum.any() for m in moments._moments.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_of_any_float_dtype_are_summed_in_fp32(dtype: torch.dtype) -> None:
    g = torch.randn(5, 3).to(dtype)
    spec = UpdateSpec.of({"w": g})
    moments = SecondMoments(spec, SubspaceConfig(ratio=1, side="long"))
    moments.add({"w": g})
    wanted = g.float() @ g.float().T
    assert torch.allclose(moments._moments["w"].sum, wanted, atol=4 * EPS * float(wanted.max()))  # type: ignore[attr-defined]


@given(st.integers(0, 6), st.integers(0, 6))
@settings(max_examples=10)
def test_moments_that_are_put_back_go_on_to_the_bit(before: int, after: int) -> None:
    spec = UpdateSpec((TensorSpec("exact", (8, 3)), TensorSpec("long", (EXACT_LIMIT + 1, 2))))
    config = SubspaceConfig(ratio=1024, side="long")
    updates = [{t.name: torch.randn(t.shape) for t in spec} for _ in range(before + after)]
    whole, first, second = (SecondMoments(spec, config) for _ in range(3))
    for update in updates:
        whole.add(update)
    for update in updates[:before]:
        first.add(update)
    second.load_state_dict({n: t.clone() for n, t in first.state_dict().items()})
    for update in updates[before:]:
        second.add(update)
    assert second.count == whole.count
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor)
    for name, (values, vectors) in whole.spectra().items():
        assert all(
            torch.equal(a, b)
            for a, b in zip(second.spectra()[name], (values, vectors), strict=True)
        )


@pytest.mark.parametrize(
    ("shapes", "change"),
    [
        ({"a": (3, 2)}, {}),
        ({"a": (3, 2), "c": (4,)}, {}),
        ({"a": (5, 3), "b": (4,)}, {}),
        ({"a": (3, 2), "b": (4,)}, {"moment.b": torch.zeros(4)}),
    ],
)
def test_moments_of_other_parameters_are_refused(
    shapes: dict[str, tuple[int, ...]], change: dict[str, Tensor]
) -> None:
    spec = UpdateSpec((TensorSpec("a", (3, 2)), TensorSpec("b", (4,))))
    other = UpdateSpec(tuple(TensorSpec(n, s) for n, s in shapes.items()))
    moments = SecondMoments(spec, SubspaceConfig(ratio=1))
    moments.add({"a": torch.ones(3, 2)})
    before = {n: t.clone() for n, t in moments.state_dict().items()}
    with pytest.raises(ConfigError, match="moments"):
        moments.load_state_dict(
            {**SecondMoments(other, SubspaceConfig(ratio=1)).state_dict(), **change}
        )
    assert all(torch.equal(t, before[n]) for n, t in moments.state_dict().items())
