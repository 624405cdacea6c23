"""Rotated signs and fitted levels in C give the bits of the torch reference."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradcodec import native, ops
from gradcodec.errors import ConfigError
from gradcodec.native import library
from gradcodec.ops.declare import OPS
from gradcodec.reference import rotsign, two_means

Same = Callable[[Tensor, Tensor], bool]
SIZES = (0, 1, 63, 65, 4097, 3 * 4096 + 17)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = torch.tensor([0.7, 0.1, 0.2])


def signs_of(numel: int, block: int, seed: int) -> Tensor:
    return ops.random_sign_words(-(-numel // block) * block, seed)


def assert_rotsign_is_the_references(
    values: Tensor, residual: Tensor | None, same: Same, **size: Any
) -> None:
    signs = signs_of(values.numel(), size["block"], 5)
    mine, its = (None, None) if residual is None else (residual.clone(), residual.clone())
    found = ops.rotsign_encode(values, signs, residual=mine, impl="native", **size)
    wanted = rotsign.encode(values, signs, residual=its, **size)
    assert same(found[0], wanted[0]), size
    assert same(found[1], wanted[1]), size
    if mine is not None and its is not None:
        assert same(mine, its), size


def assert_levels_are_the_references(
    values: Tensor, residual: Tensor | None, same: Same, block: int
) -> None:
    mine, its = (None, None) if residual is None else (residual.clone(), residual.clone())
    found = ops.lloyd_encode(values, block=block, residual=mine, impl="native")
    wanted = two_means.encode(values, block, its)
    assert same(found[0], wanted[0]), block
    assert same(found[1], wanted[1]), block
    if mine is not None and its is not None:
        assert same(mine, its), block


#: Blocks shorter and longer than a vector, signs that straddle bytes, few of a whole chunk.
CUTS = ((8, 8), (8, 3), (16, 5), (64, 1), (128, 128), (256, 64), (512, 77), (4096, 13))


@pytest.mark.parametrize("numel", SIZES)
def test_rotsign_has_the_references_bits(level: str, numel: int, same: Same) -> None:
    values = torch.randn(numel)
    for dtype, (block, kept) in itertools.product(FLOATS, CUTS):
        for residual in (None, (0.3 * torch.randn(numel)).to(dtype)):
            size = {"block": block, "kept": kept}
            assert_rotsign_is_the_references(values.to(dtype), residual, same, **size)


@pytest.mark.parametrize("numel", SIZES)
def test_means_of_signs_have_the_references_bits(level: str, numel: int, same: Same) -> None:
    for block, kept in CUTS:
        signs = torch.stack([signs_of(numel, block, seed) for seed in range(3)])
        made = [rotsign.encode(torch.randn(numel), s, block=block, kept=kept) for s in signs]
        packed, scales = (torch.stack([m[i] for m in made]) for i in (0, 1))
        for world, weights in ((1, None), (3, None), (3, WEIGHTS)):
            three = packed[:world], scales[:world], signs[:world]
            of: dict[str, Any] = {"block": block, "kept": kept, "weights": weights}
            mine = ops.rotsign_mean(*three, numel, impl="native", **of)
            assert same(mine, rotsign.decode_mean(*three, numel, **of)), of


@pytest.mark.parametrize("numel", SIZES)
def test_fitted_levels_have_the_references_bits(level: str, numel: int, same: Same) -> None:
    values = torch.randn(numel)
    # 10 and 1000 start within bytes, 1024 is the longest of which four fit a chunk.
    for dtype, block in itertools.product(FLOATS, (8, 10, 64, 256, 1000, 1024, 4096, 8192)):
        for residual in (None, (0.3 * torch.randn(numel)).to(dtype)):
            assert_levels_are_the_references(values.to(dtype), residual, same, block)


@pytest.mark.parametrize("numel", SIZES)
def test_means_of_levels_have_the_references_bits(level: str, numel: int, same: Same) -> None:
    for block in (8, 10, 256, 1000, 8192):
        made = [two_means.encode(torch.randn(numel), block) for _ in range(3)]
        packed, scales = (torch.stack([m[i].view(-1) for m in made]) for i in (0, 1))
        for weights in (None, WEIGHTS):
            of: dict[str, Any] = {"block": block, "weights": weights}
            mine = ops.lloyd_mean(packed, scales, numel, impl="native", **of)
            assert same(mine, two_means.decode_mean(packed, scales, numel, **of)), of


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_magnitudes_have_the_references_bits(
    native_library: library.Library, same: Same, data: st.DataObject
) -> None:
    # From subnormal to the end of fp32, of equal size, all of one sign, or zeros.
    numel, power = data.draw(st.integers(0, 5000)), data.draw(st.sampled_from((-140, 0, 120)))
    spread = data.draw(st.sampled_from((0.0, 1.0, 3.0)))
    make = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 32)))
    values = torch.randn(numel, generator=make)
    values *= torch.exp2(spread * torch.randn(numel, generator=make))
    values = data.draw(st.sampled_from((values, values.sign(), values.abs(), values * 0)))
    values = torch.ldexp(values, torch.tensor(power)).clamp(-3e38, 3e38)
    block = 1 << data.draw(st.integers(3, 12))
    size = {"block": block, "kept": data.draw(st.integers(1, block))}
    assert_rotsign_is_the_references(values, None, same, **size)
    assert_levels_are_the_references(values, None, same, data.draw(st.integers(8, 6000)))


def test_what_is_not_finite_spoils_its_block_alone(level: str, same: Same) -> None:
    values, signs = torch.randn(4 * 256), signs_of(1024, 256, 1)
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoilt = values.clone()
        spoilt[300] = bad
        for encode, bits in (
            (functools.partial(ops.lloyd_encode, block=256), 2),
            (lambda x, **r: ops.rotsign_encode(x, signs, block=256, kept=256, **r), 1),
        ):
            mine, whole = torch.zeros(1024), torch.zeros(1024)
            found = encode(spoilt, residual=mine, impl="native")
            expected = encode(values, residual=whole, impl="native")
            for a, b, per in (
                (found[0], expected[0], 32 * bits),
                (found[1].view(-1), expected[1].view(-1), bits),
                (mine, whole, 256),
            ):
                for block in (0, 2, 3):
                    assert same(a[block * per :][:per], b[block * per :][:per])


# -- what reaches C ------------------------------------------------------------------------------

X = torch.zeros(300)
OF_TWO = torch.zeros(1, 2, dtype=torch.bfloat16)
ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "encode": ((X,), {"bits": 4, "block": 256, "residual": X.clone()}),
    "decode_mean": (
        (torch.zeros(1, 150, dtype=torch.uint8), OF_TWO, 300),
        {"bits": 4, "block": 256, "weights": torch.ones(1)},
    ),
    "lloyd_encode": ((X,), {"block": 256, "residual": X.clone()}),
    "lloyd_mean": (
        (torch.zeros(1, 75, dtype=torch.uint8), OF_TWO.repeat(1, 2), 300),
        {"block": 256, "weights": torch.ones(1)},
    ),
    "rotsign_encode": (
        (X, signs_of(300, 256, 0)),
        {"block": 256, "kept": 256, "residual": X.clone()},
    ),
    "rotsign_mean": (
        (torch.zeros(1, 64, dtype=torch.uint8), OF_TWO, signs_of(300, 256, 0)[None], 300),
        {"block": 256, "kept": 256, "weights": torch.ones(1)},
    ),
    "topk_encode": ((X,), {"k": 2, "chunk": 64, "residual": X.clone()}),
    "top_rows": ((X,), {"residual": X.clone()}),
    "sparse_mean": (
        (torch.zeros(1, 5, 2), torch.zeros(1, 5, 2, dtype=torch.int16), 300),
        {"chunk": 64},
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_c_is_given_no_memory_of_another_size(name: str, native_library: library.Library) -> None:
    args, settings = ARGUMENTS[name]
    op = OPS[name]
    out = op.declaration(*args, **settings)
    outputs = list(out) if isinstance(out, tuple) else [out]
    settings = {**op.defaults, **settings, "out": out}
    run = getattr(native, name)
    run(*args, **settings)
    for i, argument in enumerate(args):
        # A vector of values is never short: its length says how long all else is.
        if isinstance(argument, Tensor) and (i or argument.dim() > 1):
            with pytest.raises(ConfigError, match="contiguous values"):
                run(*args[:i], argument[..., :-1], *args[i + 1 :], **settings)
    for key in ("residual", "weights"):
        if key in settings and settings[key] is not None:
            with pytest.raises(ConfigError, match=f"{key}: expected"):
                run(*args, **{**settings, key: settings[key][:-1]})
    for i, made in enumerate(outputs):
        short = [*outputs[:i], made[:-1], *outputs[i + 1 :]]
        with pytest.raises(ConfigError, match="contiguous values"):
            run(*args, **{**settings, "out": tuple(short) if len(short) > 1 else short[0]})
