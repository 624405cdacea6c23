"""What a residual stands for, as values: the form that every packer can be given by another."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradcodec.registry import UNTRAINED, make_codec

NAMES = [name for name in UNTRAINED if name not in ("fp32", "fp16", "bf16")]


@pytest.mark.parametrize("name", NAMES)
@given(numel=st.integers(1, 9000), seed=st.integers(0, 2**31))
def test_a_residual_as_values_is_what_is_missing(name: str, numel: int, seed: int) -> None:
    packer = make_codec(name).packer
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    residual = torch.zeros(packer.residual_numel(numel))
    decoded = packer.unpack(packer.pack(x, seed=seed, residual=residual), numel)
    values = packer.from_residual(residual, numel)
    assert values.shape == (numel,)
    torch.testing.assert_close(values, x - decoded, rtol=0, atol=2e-5 * float(x.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@given(numel=st.integers(1, 9000), seed=st.integers(0, 2**31))
def test_values_become_a_residual_and_values_again(name: str, numel: int, seed: int) -> None:
    packer = make_codec(name).packer
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    residual = packer.to_residual(x)
    assert residual.shape == (packer.residual_numel(numel),)
    torch.testing.assert_close(packer.from_residual(residual, numel), x, rtol=0, atol=1e-5)
