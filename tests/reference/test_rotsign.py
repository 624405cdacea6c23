"""Signs of rotated blocks against float64, value by value."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.reference import hadamard as rotation
from gradcodec.reference import rotsign
from gradcodec.reference.bitpack import packed_nbytes, unpack_bits
from gradcodec.reference.hadamard import hadamard, random_sign_words, sign_words

CUTS = [(8, 3), (64, 64), (128, 100), (256, 256), (4096, 77)]
BY_CUT = pytest.mark.parametrize(("block", "kept"), CUTS)


def signs_of(numel: int, block: int, seed: int = 5) -> Tensor:
    return random_sign_words(-(-numel // block) * block, seed)


def decoded(packed: Tensor, scales: Tensor, signs: Tensor, numel: int, **size: int) -> Tensor:
    return rotsign.decode_mean(packed[None], scales[None], signs[None], numel, **size)


@BY_CUT
def test_signs_and_scales_are_those_of_the_dense_rotation(block: int, kept: int) -> None:
    numel = 5000
    x, signs = torch.randn(numel), signs_of(numel, block)
    packed, scales = rotsign.encode(x, signs, block=block, kept=kept)
    blocks = -(-numel // block)
    rows = torch.zeros(blocks * block, dtype=torch.float64)
    rows[:numel] = x
    h = hadamard(block).double() * math.sqrt(block)
    turned = rows * rotation.signs_of(signs, blocks * block)
    y = turned.view(blocks, block) @ h.round() / math.sqrt(block)
    wanted = y.square().sum(1) / y[:, :kept].abs().sum(1)
    # Half of the last of the 8 bits of a bf16 number, and the rounding of fp32 sums.
    assert bool(((scales.double() - wanted).abs() <= (2**-8 + 1e-5) * wanted).all())
    bits = unpack_bits(packed, 1, blocks * kept).view(blocks, kept).bool()
    clear = y[:, :kept].abs() > 1e-4
    assert torch.equal(bits[clear], (y[:, :kept] < 0)[clear])
    assert float(clear.double().mean()) > 0.99


@BY_CUT
def test_what_is_decoded_and_the_residual_are_what_was_given(block: int, kept: int) -> None:
    numel = 3000
    x, before = torch.randn(numel), torch.randn(numel) / 4
    residual, signs = before.clone(), signs_of(numel, block)
    packed, scales = rotsign.encode(x, signs, block=block, kept=kept, residual=residual)
    came = decoded(packed, scales, signs, numel, block=block, kept=kept)
    assert torch.equal(residual, (x + before) - came)
    assert float(residual.norm()) > 0.3 * float(x.norm())


def test_a_weighted_mean_adds_in_order() -> None:
    numel, size = 3000, {"block": 64, "kept": 40}
    signs = torch.stack([signs_of(numel, 64, seed) for seed in range(3)])
    made = [rotsign.encode(torch.randn(numel), s, **size) for s in signs]
    packed, scales = (torch.stack([m[i] for m in made]) for i in (0, 1))
    each = [decoded(p, s, w, numel, **size) for p, s, w in zip(packed, scales, signs, strict=True)]
    weights = torch.rand(3)
    total = each[0] * weights[0] + each[1] * weights[1] + each[2] * weights[2]
    came = rotsign.decode_mean(packed, scales, signs, numel, weights=weights, **size)
    assert torch.equal(came, total)
    mean = rotsign.decode_mean(packed, scales, signs, numel, **size)
    assert torch.equal(mean, (each[0] + each[1] + each[2]) * (1.0 / 3))


@pytest.mark.parametrize("power", [-140, -60, 60, 120])
def test_a_power_of_two_passes_through(power: int) -> None:
    x, signs = torch.randint(-9, 10, (500,)).float(), signs_of(500, 64)
    packed, scales = rotsign.encode(x, signs, block=64, kept=64)
    factor = torch.tensor(2.0, dtype=torch.float64).pow(power)
    scaled = (x.double() * factor).float()
    again, its = rotsign.encode(scaled, signs, block=64, kept=64)
    assert torch.equal(again, packed)
    if power > -130:  # below, scales are subnormal
        assert torch.equal(its.double(), scales.double() * factor)


@pytest.mark.parametrize("block", [8, 256, 512, 4096])
def test_no_sum_of_large_scales_leaves_fp32(block: int) -> None:
    # Sums of a whole block of scales would: 4096 times 1e37.
    x, signs = torch.full((block,), 1e37), signs_of(block, block)
    packed, scales = rotsign.encode(x, signs, block=block, kept=block)
    came = decoded(packed, scales, signs, block, block=block, kept=block)
    assert bool(came.isfinite().all())
    assert 0.1 < float((came / 1e37 - 1).norm()) / math.sqrt(block) < 1.2


@given(st.integers(0, 200), st.integers(3, 12), st.data())
def test_sizes_are_exact(numel: int, power: int, data: st.DataObject) -> None:
    block = 1 << power
    kept, blocks = data.draw(st.integers(1, block)), -(-numel // block)
    packed, scales = rotsign.encode(
        torch.randn(numel), signs_of(numel, block), block=block, kept=kept
    )
    assert packed.shape == (packed_nbytes(blocks * kept, 1),)
    assert scales.shape == (blocks,)
    left_over = blocks * kept % 8
    assert not left_over or int(packed[-1]) >> left_over == 0


def test_segments_cannot_be_seen() -> None:
    block, kept = 4096, 13
    cut = rotsign.segment_of(block)
    numel = cut + 5000
    x, signs = torch.randn(numel), signs_of(numel, block)
    packed, scales = rotsign.encode(x, signs, block=block, kept=kept)
    tail = rotsign.encode(x[cut:], signs[cut // 64 :], block=block, kept=kept)
    assert torch.equal(packed[cut // block * kept // 8 :], tail[0])
    assert torch.equal(scales[cut // block :], tail[1])
    came = decoded(packed, scales, signs, numel, block=block, kept=kept)
    its = decoded(*tail, signs[cut // 64 :], 5000, block=block, kept=kept)
    assert torch.equal(came[cut:], its)


def test_words_hold_the_random_signs() -> None:
    words = random_sign_words(130, 9)
    assert len(words) == sign_words(130) == 3
    bits = [(int(words[i // 64]) >> (i % 64)) & 1 for i in range(130)]
    assert rotation.signs_of(words, 130).tolist() == [1.0 - 2.0 * b for b in bits]
