"""Named tensors to vectors and back."""

import math

import pytest
import torch
from conformance import UPDATES, differing, model
from hypothesis import given
from hypothesis import strategies as st

from gradcodec import layout
from gradcodec.errors import NonFiniteError, UpdateError
from gradcodec.types import TensorSpec, UpdateSpec


@pytest.mark.parametrize("name", [n for n in UPDATES if n != "mixed dtypes"])
def test_unflatten_is_the_inverse_of_flatten(name: str) -> None:
    update = UPDATES[name]()
    spec = UpdateSpec.of(update)
    assert differing(update, layout.unflatten(layout.flatten(update, spec), spec)) == []


def test_values_follow_the_spec_in_row_major_order() -> None:
    update = {"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T, "a": torch.tensor(5.0)}
    vector = layout.flatten(update, UpdateSpec.of(update))
    assert vector.tolist() == [1, 3, 2, 4, 5]


def test_the_specs_order_counts_not_the_updates() -> None:
    update = {"b": torch.tensor(1.0), "a": torch.tensor(2.0)}
    spec = UpdateSpec((TensorSpec("a", ()), TensorSpec("b", ())))
    assert layout.flatten(update, spec).tolist() == [2, 1]


def test_flatten_gives_fp32_without_a_graph() -> None:
    update = {"h": torch.ones(3, dtype=torch.float16), "w": torch.ones(2, requires_grad=True)}
    vector = layout.flatten(update, UpdateSpec.of(update))
    assert (vector.dtype, vector.requires_grad) == (torch.float32, False)


def test_flatten_any_and_unflatten_are_differentiable() -> None:
    update = {n: t.requires_grad_() for n, t in model().items()}
    spec = UpdateSpec.of(update)
    again = layout.unflatten(layout.flatten_any(update, spec), spec)
    sum(t.sum() for t in again.values()).backward()
    assert [n for n, t in update.items() if not torch.equal(t.grad, torch.ones_like(t))] == []


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
def test_integers_are_refused_in_both_directions(dtype: torch.dtype) -> None:
    spec = UpdateSpec((TensorSpec("i", (2,), dtype),))
    with pytest.raises(UpdateError, match="floating"):
        layout.flatten({"i": torch.zeros(2, dtype=dtype)}, spec)
    with pytest.raises(UpdateError, match="floating"):
        layout.unflatten(torch.zeros(2), spec)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_a_vector_of_another_length_is_refused(count: int) -> None:
    with pytest.raises(UpdateError, match="3 elements"):
        layout.unflatten(torch.zeros(count), UpdateSpec((TensorSpec("v", (3,)),)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_narrowing_keeps_finite_values_finite(dtype: torch.dtype) -> None:
    top = torch.finfo(torch.float32).max
    narrowed = layout.narrow(torch.tensor([top, -top, 1.5]), dtype)
    assert narrowed.dtype == dtype
    assert bool(torch.isfinite(narrowed).all())
    assert narrowed[2] == 1.5


def test_narrowing_saturates_at_the_largest_value() -> None:
    assert layout.narrow(torch.tensor([1e6, -1e6]), torch.float16).tolist() == [65504, -65504]


def test_narrowing_keeps_nan() -> None:
    assert bool(layout.narrow(torch.tensor([math.nan]), torch.float16).isnan().all())


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [
        ((), (1, 1)),
        ((7,), (7, 1)),
        ((0,), (0, 1)),
        ((3, 5), (3, 5)),
        ((0, 4), (0, 4)),
        ((4, 0), (4, 0)),
        ((6, 5, 3, 3), (6, 45)),
    ],
)
def test_matrix_shapes(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    assert layout.matrix_shape(TensorSpec("t", shape)) == matrix


@given(st.lists(st.integers(0, 6), max_size=4).map(tuple))
def test_the_matrix_has_all_elements(shape: tuple[int, ...]) -> None:
    spec = TensorSpec("t", shape)
    assert math.prod(layout.matrix_shape(spec)) == spec.numel


def test_check_finite_counts_what_is_not() -> None:
    with pytest.raises(NonFiniteError, match=r"w: .* 3 of 5"):
        layout.check_finite(torch.tensor([1, math.nan, math.inf, -math.inf, 0]), "w")


def test_check_finite_counts_what_leaves_no_room() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.tensor([1e30, -1e37, math.nan, 1e34], dtype=dtype)
        layout.check_finite(values[[0, 3]], "w", 1e3)
        with pytest.raises(NonFiniteError, match=r"w: .* 2 of 4 are NaN or Inf or beyond 3.4e\+35"):
            layout.check_finite(values, "w", 1e3)


def test_check_finite_passes_finite_and_empty() -> None:
    layout.check_finite(torch.tensor([torch.finfo(torch.float32).max]), "w")
    layout.check_finite(torch.empty(0), "w")
