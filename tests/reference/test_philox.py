"""The dither's bytes are those of Philox4x32-7, wherever one begins to read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradcodec.reference.philox import ROUNDS, random_bytes

WORD = 0xFFFFFFFF


def philox(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """Philox4x32 by its definition, with Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        left, right = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [right >> 32 ^ c[1] ^ k[0], right & WORD, left >> 32 ^ c[3] ^ k[1], left & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def stream(start: int, count: int, seed: int) -> list[int]:
    """The same bytes by the loop."""
    out = []
    for i in range(start, start + count):
        block = i // 16
        words = philox([block & WORD, block >> 32, 0, 0], [seed & WORD, seed >> 32], ROUNDS)
        out.append(words[i % 16 // 4] >> 8 * (i % 4) & 0xFF)
    return out


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [
        # Known answers of Random123 1.14 (kat_vectors), by the authors of the generator.
        (7, "00000000 " * 4, "00000000 " * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, "ffffffff " * 4, "ffffffff " * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            7,
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
        (10, "00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ],
)
def test_the_loop_gives_the_known_answers(rounds: int, counter: str, key: str, words: str) -> None:
    numbers = [[int(w, 16) for w in text.split()] for text in (counter, key, words)]
    assert philox(numbers[0], numbers[1], rounds) == numbers[2]


def test_seven_rounds_of_zero_are_the_first_known_answer() -> None:
    words = (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    expected = b"".join(w.to_bytes(4, "little") for w in words)
    assert bytes(random_bytes(0, 16, 0).tolist()) == expected


@given(st.integers(0, 1 << 40), st.integers(0, 70), st.integers(0, (1 << 64) - 1))
def test_bytes_are_those_of_the_loop(start: int, count: int, seed: int) -> None:
    assert random_bytes(start, count, seed).tolist() == stream(start, count, seed)


def test_a_seed_and_its_negative_of_64_bits_are_one() -> None:
    seed = 0xFEDCBA9876543210
    assert torch.equal(random_bytes(5, 40, seed), random_bytes(5, 40, seed - (1 << 64)))


def test_bytes_are_uniform_and_uncorrelated() -> None:
    drawn = random_bytes(0, 1 << 20, 7).double()
    n = len(drawn)
    # The mean of n uniform bytes has a standard deviation of 73.9 / sqrt(n).
    assert abs(float(drawn.mean()) - 127.5) < 5 * 73.9 / n**0.5
    counts = torch.bincount(drawn.long(), minlength=256).double()
    chi = float(((counts - n / 256).square() / (n / 256)).sum())
    # 255 degrees of freedom: mean 255, standard deviation sqrt(510).
    assert abs(chi - 255) < 5 * 510**0.5
    centred = drawn - drawn.mean()
    for lag in (1, 4, 16, 4096):
        product = float((centred[lag:] * centred[:-lag]).mean() / centred.square().mean())
        assert abs(product) < 5 / n**0.5
