"""One optimiser for a whole federation: each round it starts from what the server sent."""

from collections.abc import Callable, Mapping

import pytest
import torch
from federated.toy import Toy, equal, subspace
from torch import Tensor

from gradcodec.chain import Chain
from gradcodec.codecs import BlockQuant
from gradcodec.faf import LatentOptimizer
from gradcodec.federated import Client, Server, ServerConfig
from gradcodec.packers.blockquant import BlockQuantConfig

ROUNDS = 12
LATENT = ServerConfig(mode="latent")
State = dict[str, Tensor]
Prepare = Callable[[LatentOptimizer | None, Toy, Client], LatentOptimizer]


def fresh(kept: LatentOptimizer | None, toy: Toy, client: Client) -> LatentOptimizer:
    return LatentOptimizer(toy.parameters, client.codec, torch.optim.AdamW, lr=0.05)


def fresh_with_kept_moments(
    kept: LatentOptimizer | None, toy: Toy, client: Client
) -> LatentOptimizer:
    made = fresh(None, toy, client)
    if kept is not None:
        made.inner.load_state_dict(kept.inner.state_dict())
    return made


def rebased(kept: LatentOptimizer | None, toy: Toy, client: Client) -> LatentOptimizer:
    kept = kept or fresh(None, toy, client)
    kept.rebase()
    return kept


@torch.no_grad()
def load(toy: Toy, state: Mapping[str, Tensor]) -> None:
    for name, p in toy.parameters.items():
        p.copy_(state[name])


def leads_there(toy: Toy, start: Mapping[str, Tensor], optimizer: LatentOptimizer) -> bool:
    """Whether the start and the code together are the parameters, apart from rounding."""
    moved = optimizer.codec.from_code(optimizer.code)
    return all(torch.allclose(start[n] + moved[n], p, atol=1e-5) for n, p in toy.parameters.items())


def federation(
    prepare: Prepare, *, strict: bool = True
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Held-out losses of three clients' rounds, and the last state; each has its own model."""
    toys = [Toy() for _ in range(3)]
    initial = toys[0].initial
    codec = Chain(subspace(0.75), BlockQuant(BlockQuantConfig(8, block=16)))
    server = Server(initial, codec, config=LATENT)
    clients = [Client(i, initial, codec, config=LATENT) for i in range(3)]
    kept: list[LatentOptimizer | None] = [None, None, None]
    losses = []
    for round_number in range(ROUNDS):
        for i, (toy, client) in enumerate(zip(toys, clients, strict=True)):
            sent = client.receive(server.broadcast(client.version))
            load(toy, sent)
            optimizer = kept[i] = prepare(kept[i], toy, client)
            examples = toy.train(i, round_number, optimizer).examples
            assert optimizer.anchored_at(sent)
            server.receive(client.reply(optimizer, examples))
        server.close_round()
        load(toys[0], server.replica.state())
        losses.append(toys[0].evaluate())
    return losses, server.replica.state()


def test_a_kept_optimiser_rebased_is_a_fresh_one_with_its_moments() -> None:
    losses, state = federation(rebased)
    wanted, expected = federation(fresh_with_kept_moments)
    assert losses == wanted
    assert equal(state, expected)


def test_a_kept_optimiser_trains_as_well_as_a_fresh_one() -> None:
    losses, _ = federation(rebased)
    wanted, _ = federation(fresh)
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] <= 1.1 * wanted[-1]


def test_without_rebase_the_code_has_earlier_rounds_in_it_and_that_can_be_asked() -> None:
    toy = Toy()
    initial = toy.initial
    server = Server(initial, subspace(), config=LATENT)
    client = Client(0, initial, subspace(), config=LATENT)
    optimizer = fresh(None, toy, client)
    toy.train(0, 0, optimizer)
    assert optimizer.anchored_at(initial)
    assert leads_there(toy, initial, optimizer)
    server.receive(client.reply(optimizer, examples=1))
    server.close_round()

    sent = client.receive(server.broadcast(client.version))
    load(toy, sent)
    toy.train(0, 1, optimizer)
    assert not optimizer.anchored_at(sent)
    assert not leads_there(toy, sent, optimizer)

    load(toy, sent)
    optimizer.rebase()
    toy.train(0, 1, optimizer)
    assert optimizer.anchored_at(sent)
    assert leads_there(toy, sent, optimizer)


@pytest.mark.parametrize("clamped", [False, True])
def test_a_clamp_between_local_steps_is_not_in_the_code(clamped: bool) -> None:
    toy = Toy()
    initial = toy.initial
    client = Client(0, initial, subspace(), config=LATENT)
    optimizer = fresh(None, toy, client)
    for step in range(3):
        toy.train(0, step, optimizer)
        if clamped:
            with torch.no_grad():
                for p in toy.parameters.values():
                    p.clamp_(-0.2, 0.2)
    assert leads_there(toy, initial, optimizer) == (not clamped)
    assert optimizer.anchored_at(initial) == (not clamped)
