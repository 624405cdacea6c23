"""The two bands of the ``llama`` benchmark, on a toy: both ends do the same, from bytes alone."""

import pytest
import torch

from benchmarks.llama.bands import Banded, Bands
from benchmarks.peers.federated.random_subspace import random_bases
from gradcodec import layout
from gradcodec.errors import CodecMismatchError, MalformedBodyError
from gradcodec.packers.rotsign import RotatedSignConfig, RotatedSignPacker
from gradcodec.types import UpdateSpec

NEAR = RotatedSignPacker(RotatedSignConfig(kept=256, block=256))
FAR = RotatedSignPacker(RotatedSignConfig(kept=256, block=4096))


def initial() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "q.lora_A.weight": torch.randn(8, 512, generator=g),
        "q.lora_B.weight": torch.zeros(512, 8),
    }


def federation(subspace: bool, shrink: float = 1.0) -> Banded:
    spec = UpdateSpec.of(initial())
    bases = random_bases(initial(), ratio=8, seed=0).bind(spec) if subspace else None
    return Banded(initial(), Bands(spec, bases, NEAR, FAR, shrink), 0)


@pytest.mark.parametrize("subspace", [True, False])
def test_a_client_that_missed_rounds_comes_to_the_servers_bits(subspace: bool) -> None:
    """Two instances with bytes between them: nothing else is shared."""
    server, clients = federation(subspace), federation(subspace)
    g = torch.Generator().manual_seed(1)
    for number in range(3):
        for client in (4, 2) if number else (2,):
            state = clients.arrive(client, server.broadcast(client))
            end = {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in state.items()}
            server.receive(clients.reply(client, None, end, 3 + client))  # type: ignore[arg-type]
        server.close_round()
    for client in (2, 4, 9):  # the last one missed all
        state = clients.arrive(client, server.broadcast(client))
        assert all(torch.equal(state[n], t) for n, t in server.state().items())
        assert not torch.equal(state["q.lora_B.weight"], initial()["q.lora_B.weight"])


@pytest.mark.parametrize("subspace", [True, False])
def test_bands_are_right_on_average_and_as_large_as_they_say(subspace: bool) -> None:
    bands = federation(subspace).bands
    x = torch.randn(bands.spec.numel, generator=torch.Generator().manual_seed(2))
    bodies = [bands.encode(x, 2 * seed) for seed in range(400)]
    assert {len(body) for body in bodies} == {bands.nbytes}
    mean = torch.stack([bands.decode(body) for body in bodies]).mean(0)
    error = float((mean - x).square().sum() / x.square().sum())
    assert 0.02 < error < 0.12  # about 25 for one at 1/16 bit, over 400


def test_what_is_outside_is_shrunk_and_what_is_inside_is_not() -> None:
    whole, half = federation(True).bands, federation(True, 0.5).bands
    assert whole.subspace is not None
    x = torch.randn(whole.spec.numel, generator=torch.Generator().manual_seed(3))
    body = whole.encode(x, 0)
    full, less = whole.decode(body), half.decode(body)
    inside = whole._of_code(whole.subspace.to_code(_named(full, whole)))
    torch.testing.assert_close(less, inside + 0.5 * (full - inside), rtol=0, atol=1e-4)


def _named(x: torch.Tensor, bands: Bands) -> dict[str, torch.Tensor]:
    return layout.unflatten(x, bands.spec)


def test_damaged_rounds_are_refused() -> None:
    banded = federation(False)
    with pytest.raises(MalformedBodyError, match="bytes each"):
        banded._step_of(bytes(7))
    with pytest.raises(CodecMismatchError, match="from 1 to 0"):
        banded.relayed.arrive(banded.start, 1, banded.relayed.broadcast(0))
