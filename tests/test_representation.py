"""Laws of what is sent: differences, states, and the balanced gauge of LoRA pairs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.errors import ConfigError
from gradcodec.representation import RECORDED, SENT, balanced, check, represent

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
EPS = torch.finfo(torch.float32).eps

sides = st.integers(1, 12)
ranks = st.integers(1, 9)
seeds = st.integers(0, 1000)


def pair(seed: int, out: int, rank: int, inputs: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        A: torch.randn(rank, inputs, generator=generator),
        B: torch.randn(out, rank, generator=generator),
    }


def product(state: dict[str, Tensor]) -> Tensor:
    return state[B].double() @ state[A].double()


@given(seeds, sides, ranks, sides)
def test_balancing_keeps_the_product_and_the_shapes(
    seed: int, out: int, rank: int, inputs: int
) -> None:
    state = pair(seed, out, rank, inputs)
    result = balanced(state)
    assert [(n, t.shape, t.dtype) for n, t in result.items()] == [
        (n, t.shape, t.dtype) for n, t in state.items()
    ]
    bound = 4 * rank * EPS * float(product(state).norm())
    assert float((product(result) - product(state)).norm()) <= bound


@given(seeds, sides, ranks, sides)
def test_balanced_factors_have_equal_diagonal_grams(
    seed: int, out: int, rank: int, inputs: int
) -> None:
    result = balanced(pair(seed, out, rank, inputs))
    left = result[B].double().T @ result[B].double()
    right = result[A].double() @ result[A].double().T
    bound = 8 * EPS * float(left.diagonal().max())
    assert float((left - right).abs().max()) <= bound
    assert float((left - torch.diag(left.diagonal())).abs().max()) <= bound


@given(seeds, st.integers(6, 12), st.integers(1, 4), st.integers(6, 12))
def test_the_gauge_does_not_matter(seed: int, out: int, rank: int, inputs: int) -> None:
    state = pair(seed, out, rank, inputs)
    q = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q
    q = q * torch.logspace(-1, 1, rank, dtype=torch.float64)  # condition number 100 at most
    # In float64, so that what is compared is the map and not the rounding of its input.
    wide = {n: t.double() for n, t in state.items()}
    turned = {A: torch.linalg.solve(q, wide[A]), B: wide[B] @ q}
    ours, theirs = balanced(wide), balanced(turned)
    # A singular vector is known as well as its value is apart from the others.
    values = torch.linalg.svdvals(product(state))[:rank]
    gaps = [*(values[:-1] - values[1:]).tolist(), float(values[-1])]
    bound = 1e-11 * float(values[0]) ** 1.5 / min(gaps)
    for name in (A, B):
        assert float((ours[name] - theirs[name]).abs().max()) <= bound


@given(seeds, st.integers(4, 10), st.integers(1, 4))
def test_balancing_twice_is_balancing_once(seed: int, side: int, rank: int) -> None:
    state = {n: t.double() for n, t in pair(seed, side, rank, side).items()}
    once = balanced(state)
    again = balanced(once)
    assert float((product(again) - product(once)).abs().max()) <= 1e-13 * float(
        state[B].norm()
    ) * float(state[A].norm())
    for name in (A, B):
        grams = [t @ t.T if name == A else t.T @ t for t in (once[name], again[name])]
        assert torch.allclose(grams[0], grams[1], rtol=0, atol=1e-12 * float(grams[0].abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_balancing_keeps_dtypes(dtype: torch.dtype) -> None:
    state = {n: t.to(dtype) for n, t in pair(0, 6, 2, 8).items()}
    assert {t.dtype for t in balanced(state).values()} == {dtype}


def test_tensors_without_a_partner_stay_as_they_are() -> None:
    state = {
        "other.lora_A.weight": torch.randn(2, 5),
        "norm.weight": torch.randn(4),
        "conv.lora_A.weight": torch.randn(2, 3, 3, 3),
        "conv.lora_B.weight": torch.randn(4, 2, 1, 1),
    }
    result = balanced(state)
    assert all(torch.equal(result[n], t) for n, t in state.items())


def test_a_fresh_adapter_of_zero_product_stays_finite_and_zero() -> None:
    state = {A: torch.randn(2, 5), B: torch.zeros(4, 2)}
    result = balanced(state)
    assert all(bool(torch.isfinite(t).all()) for t in result.values())
    assert not product(result).any()


def test_balancing_does_not_modify_its_input() -> None:
    state = pair(0, 5, 2, 5)
    before = {n: t.clone() for n, t in state.items()}
    balanced(state)
    assert all(torch.equal(state[n], t) for n, t in before.items())


def test_the_readings_are_difference_state_and_balanced_state() -> None:
    start, end = pair(0, 5, 2, 5), pair(1, 5, 2, 5)
    update, state = represent("update", end, start), represent("state", end, start)
    gauge = represent("balanced", end, start)
    for name in (A, B):
        assert torch.equal(update[name], end[name] - start[name])
        assert torch.equal(state[name], end[name])
        assert state[name].data_ptr() != end[name].data_ptr()
        assert torch.equal(gauge[name], balanced(end)[name])


def test_an_unknown_reading_is_named() -> None:
    assert [check(r, RECORDED) for r in RECORDED] == list(RECORDED)
    with pytest.raises(ConfigError, match="'gradient'"):
        check("gradient", SENT)
