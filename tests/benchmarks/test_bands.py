"""Codes below a bit and their ways down, on a toy: both ends do the same, from bytes alone."""

import itertools

import pytest
import torch

from benchmarks.llama.bands import Banded
from benchmarks.llama.codes import Bands, Factors, Signs, contraction
from benchmarks.peers.federated.base import flat
from benchmarks.peers.federated.envelope import Broadcast
from benchmarks.peers.federated.random_subspace import random_bases
from gradcodec import layout
from gradcodec.codecs import Subspace
from gradcodec.errors import CodecMismatchError, MalformedBodyError
from gradcodec.packers.rotsign import RotatedSignConfig, RotatedSignPacker
from gradcodec.types import UpdateSpec

NEAR = RotatedSignPacker(RotatedSignConfig(kept=256, block=256))


def initial() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "q.lora_A.weight": torch.randn(8, 512, generator=g),
        "q.lora_B.weight": torch.zeros(512, 8),
    }


SPEC = UpdateSpec.of(initial())


def bands(shrink: float = 1.0) -> Bands:
    bases = random_bases(initial(), ratio=8, seed=0).bind(SPEC)
    assert isinstance(bases, Subspace)
    return Bands(SPEC, bases, NEAR, Signs(SPEC.numel, 256, shrink))


CODES = {
    "signs": Signs(SPEC.numel, 256),
    "factors": Factors(SPEC, (256, 1.0), (1024, 1.0)),
    "bands": bands(),
}


@pytest.mark.parametrize("name", CODES)
def test_a_client_that_missed_rounds_comes_to_the_servers_bits(name: str) -> None:
    """Two instances with bytes between them: nothing else is shared."""
    server, clients = (Banded(initial(), CODES[name]) for _ in range(2))
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


@pytest.mark.parametrize("name", CODES)
def test_a_code_is_right_on_average_and_as_large_as_it_says(name: str) -> None:
    code = CODES[name]
    x = torch.randn(SPEC.numel, generator=torch.Generator().manual_seed(2))
    bodies = [code.encode(x, 2 * seed) for seed in range(400)]
    assert {len(body) for body in bodies} == {code.nbytes}
    mean = torch.stack([code.decode(body) for body in bodies]).mean(0)
    error = float((mean - x).square().sum() / x.square().sum())
    assert 0.02 < error < 0.12  # about 25 for one at 1/16 bit, over 400


def test_what_is_outside_is_shrunk_and_what_is_inside_is_not() -> None:
    whole, half = bands(), bands(0.5)
    x = torch.randn(SPEC.numel, generator=torch.Generator().manual_seed(3))
    body = whole.encode(x, 0)
    full, less = whole.decode(body), half.decode(body)
    inside = whole._of_code(whole.subspace.to_code(layout.unflatten(full, SPEC)))
    torch.testing.assert_close(less, inside + 0.5 * (full - inside), rtol=0, atol=1e-4)


def test_damaged_rounds_are_refused() -> None:
    banded = Banded(initial(), CODES["signs"])
    with pytest.raises(MalformedBodyError, match="bytes each"):
        banded._step_of(bytes(7))
    skipped = Broadcast(3, (b"",)).to_bytes()
    with pytest.raises(CodecMismatchError, match="from 1 to 3"):
        banded.relayed.arrive(banded.start, 1, skipped)


def rounds_of(server: Banded, clients: Banded, who: tuple[tuple[int, ...], ...]) -> None:
    """Each client moves towards one point."""
    goal = torch.randn(SPEC.numel, generator=torch.Generator().manual_seed(5))
    for round in who:
        for client in round:
            held = flat(clients.arrive(client, server.broadcast(client)))
            end = layout.unflatten(held + 0.5 * (goal - held), SPEC)
            server.receive(clients.reply(client, None, end, 1))  # type: ignore[arg-type]
        server.close_round()


def test_an_own_difference_costs_the_same_after_any_number_of_rounds() -> None:
    down = Signs(SPEC.numel, 2048, contraction(2048))
    server, clients = (Banded(initial(), Signs(SPEC.numel, 4096), down=down) for _ in range(2))
    rounds_of(server, clients, ((1, 2), (2,), (2,), (2,)))
    assert len(server.broadcast(1)) == len(server.broadcast(2))


def test_both_ends_of_an_own_difference_hold_the_same() -> None:
    """And what it leaves out comes with the next ones, while the server's vector stands still."""
    down = Signs(SPEC.numel, 2048, contraction(2048))
    server, clients = (Banded(initial(), Signs(SPEC.numel, 4096), down=down) for _ in range(2))
    rounds_of(server, clients, ((1, 2), (2,)))
    assert server.own is not None
    exact = flat(server.state())
    away = []
    for _ in range(4):
        held = flat(clients.arrive(1, server.broadcast(1)))
        assert torch.equal(held, server.own._theirs[1])
        away.append(float((exact - held).norm()))
        server._sent_to[1] = -1  # ask again, as if rounds had passed that changed nothing
    assert away[3] < 0.75 * away[0]
    assert all(b < a for a, b in itertools.pairwise(away))


def test_a_frozen_a_is_neither_sent_nor_moved() -> None:
    code = Factors(SPEC, None, (1024, 1.0))
    x = torch.randn(SPEC.numel)
    decoded = layout.unflatten(code.decode(code.encode(x, 0)), SPEC)
    assert not decoded["q.lora_A.weight"].any()
    assert decoded["q.lora_B.weight"].any()
    banded = Banded(initial(), code)
    parameters = {n: torch.nn.Parameter(t) for n, t in initial().items()}
    held = banded.optimizer(0, parameters, torch.optim.SGD, lr=0.1).param_groups[0]["params"]
    assert [p.shape for p in held] == [initial()["q.lora_B.weight"].shape]
