"""Federations whose clients clip and noise their replies (``ServerConfig(privacy=...)``)."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gradcodec.codecs import BlockQuant, Identity
from gradcodec.errors import ConfigError, TrainingError
from gradcodec.faf import LatentOptimizer
from gradcodec.federated import Server, ServerConfig
from gradcodec.federated.envelope import Reply
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.privacy import ClientPrivacy
from tests.federated.toy import Toy, quantised, subspace

INITIAL = Toy().initial


def norm(update: dict[str, Tensor]) -> float:
    return float(torch.cat([t.reshape(-1) for t in update.values()]).norm())


def far(seed: int, scale: float = 5.0) -> dict[str, Tensor]:
    """A state far from the initial one."""
    g = torch.Generator().manual_seed(seed)
    return {n: t + scale * torch.randn(t.shape, generator=g) for n, t in INITIAL.items()}


def federation(codec: Any, **options: Any) -> Server:
    mode = options.pop("mode", "post")
    return Server(INITIAL, codec, config=ServerConfig(mode=mode, privacy=ClientPrivacy(**options)))


@pytest.mark.parametrize("place", ["code", "update"])
@pytest.mark.parametrize("codec", [Identity(), subspace(1.0)])
def test_no_client_contributes_more_than_the_clip(codec: Any, place: str) -> None:
    server = federation(codec, clip=0.5, noise=0.0, place=place)
    client = server.client(1)
    client.receive(server.broadcast(0))
    blob = client.reply(far(1), 3)
    payload = replace(Reply.from_bytes(blob).payload, base=server.uplink.base)
    sent = server.uplink.decoder.decode(payload)
    assert 0.499 < norm(sent) <= 0.5 * (1 + 1e-6)


def test_the_number_of_examples_is_not_sent_and_everyone_counts_once() -> None:
    server = federation(Identity(), clip=100.0, noise=0.0)
    ends = {1: far(1, 0.1), 2: far(2, 0.1)}
    for number, end in ends.items():
        client = server.client(number)
        client.receive(server.broadcast(0))
        blob = client.reply(end, 1000 * number)
        assert Reply.from_bytes(blob).examples == 1
        server.receive(blob)
    server.close_round()
    for name, t in server.replica.state().items():
        torch.testing.assert_close(t, (ends[1][name] + ends[2][name]) / 2, rtol=0, atol=1e-6)


def test_replies_hold_noise_that_averages_out() -> None:
    """Sixty-four clients with one share each: the sum holds the noise of one."""
    clients, noise = 64, 2.0
    server = federation(Identity(), clip=1.0, noise=noise, shares=clients, seed=0)
    for number in range(clients):
        client = server.client(number)
        client.receive(server.broadcast(0))
        server.receive(client.reply(INITIAL, 1))
    server.close_round()
    state = server.replica.state()
    error = torch.cat([(state[n] - t).reshape(-1) for n, t in INITIAL.items()])
    wanted = noise * error.numel() ** 0.5 / clients
    assert 0.7 * wanted < float(error.norm()) < 1.3 * wanted


def test_a_round_with_too_little_noise_is_not_closed() -> None:
    server = federation(Identity(), clip=1.0, noise=1.0, shares=3)
    for number in range(2):
        client = server.client(number)
        client.receive(server.broadcast(0))
        server.receive(client.reply(INITIAL, 1))
    with pytest.raises(TrainingError, match="3 shares"):
        server.close_round()
    client = server.client(2)
    client.receive(server.broadcast(0))
    server.receive(client.reply(INITIAL, 1))
    server.close_round()
    assert server.round == 1


def test_a_trained_code_is_clipped_and_noised() -> None:
    server = federation(quantised(8), clip=0.3, noise=0.0, mode="latent")
    client = server.client(0)
    state = client.receive(server.broadcast(0))
    parameters = {n: torch.nn.Parameter(t.clone()) for n, t in state.items()}
    optimizer = LatentOptimizer(parameters, client.codec, torch.optim.SGD, lr=10.0)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert float(optimizer.code.norm()) > 1
    server.receive(client.reply(optimizer, 7))
    server.close_round()
    moved = {n: t - INITIAL[n] for n, t in server.replica.state().items()}
    assert 0.25 < norm(moved) < 0.32  # 8 bits err a little


def test_tensors_that_travel_bit_for_bit_are_refused_by_name() -> None:
    initial = {**INITIAL, "running_mean": torch.zeros(3), "count": torch.tensor(1)}
    privacy = ClientPrivacy(1.0, 1.0)
    with pytest.raises(ConfigError, match=r"'(running_mean|count)' travels bit for bit"):
        Server(initial, quantised(), config=ServerConfig(privacy=privacy))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"representation": "state"}, "not states"),
        ({"mode": "latent", "privacy": ClientPrivacy(1.0, 1.0, place="update")}, "place 'code'"),
        ({"aggregation": "median", "privacy": ClientPrivacy(1.0, 1.0, shares=2)}, "plain sum"),
        ({"max_norm": 1.0, "privacy": ClientPrivacy(1.0, 1.0, shares=2)}, "plain sum"),
        ({"privacy": 3.0}, "ClientPrivacy"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        ServerConfig(**{"privacy": ClientPrivacy(1.0, 1.0), **options})


def test_a_federation_still_learns_with_little_noise() -> None:
    """The whole loop: clip above the usual norm, noise small; the loss falls as without."""
    task = Toy()
    losses = {}
    for name, privacy in (
        ("plain", None),
        ("private", ClientPrivacy(5.0, noise=0.001, seed=1)),
        ("noisy", ClientPrivacy(5.0, noise=0.08, seed=1)),
    ):
        config = ServerConfig(privacy=privacy)
        server = Server(INITIAL, BlockQuant(BlockQuantConfig(8, block=16)), config=config)
        clients = {c: server.client(c) for c in range(4)}
        for number in range(6):
            for c, client in clients.items():
                state = client.receive(server.broadcast(client.version))
                with torch.no_grad():
                    for n, p in task.parameters.items():
                        p.copy_(state[n])
                optimizer = torch.optim.SGD(task.parameters.values(), lr=0.05)
                task.train(c, number, optimizer)
                server.receive(client.reply(dict(task.parameters), 1))
            server.close_round()
        with torch.no_grad():
            for n, p in task.parameters.items():
                p.copy_(server.replica.state()[n])
        losses[name] = task.evaluate()
    assert losses["private"] == pytest.approx(losses["plain"], rel=0.1)
    assert losses["noisy"] > 1.2 * losses["plain"]
