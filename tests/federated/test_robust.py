"""Trimmed mean and median: a few bad clients do not move the model, whatever they send."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.codecs import Identity
from gradcodec.errors import ConfigError, UnexpectedReplyError
from gradcodec.federated import Server, ServerConfig, robust
from gradcodec.federated.robust import robust_mean
from tests.federated import toy
from tests.federated.toy import CODECS, Toy, equal, quantised, subspace

INITIAL = Toy().initial
ROBUST = ("trimmed", "median")


def values(seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: scale * torch.randn(t.shape, generator=g) for n, t in INITIAL.items()}


def flat(update: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in update.values()])


def moved(server: Server) -> Tensor:
    state = server.replica.state()
    return torch.cat([(state[n] - t).reshape(-1) for n, t in INITIAL.items()])


def close(server: Server, updates: dict[int, dict[str, Tensor]], examples: int = 1) -> None:
    for client, update in updates.items():
        server.receive(toy.reply(server, client, update, examples).to_bytes())
    server.close_round()


@given(st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([None, 0.1, 0.25, 0.49]))
def test_every_coordinate_lies_between_honest_values(k: int, seed: int, trim: float | None) -> None:
    """As many as are cut off may be anything."""
    cut = (k - 1) // 2 if trim is None else min((k - 1) // 2, math.ceil(round(trim * k, 9)))
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(k, 7, generator=g)
    honest = x[cut:]
    x[:cut] = 1e30 * torch.sign(torch.randn(cut, 7, generator=g))
    mean = robust_mean(x, trim)
    assert bool((mean >= honest.min(0).values - 1e-6).all())
    assert bool((mean <= honest.max(0).values + 1e-6).all())


@given(st.integers(1, 30), st.integers(0, 2**31), st.sampled_from([None, 0.2]))
def test_the_order_of_clients_changes_no_bit(k: int, seed: int, trim: float | None) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(k, 5, generator=g)
    shuffled = x[torch.randperm(k, generator=g)]
    assert torch.equal(robust_mean(x, trim), robust_mean(shuffled, trim))


def test_a_trimmed_mean_of_few_is_what_it_says() -> None:
    x = torch.tensor([[1.0], [2.0], [3.0], [100.0]])
    assert float(robust_mean(x, 0.25)) == 2.5
    assert float(robust_mean(x, 0.01)) == 2.5  # one is cut off at each end, at least
    assert float(robust_mean(x, None)) == 2.5
    assert float(robust_mean(x[:3], None)) == 2.0


@pytest.mark.parametrize("aggregation", ROBUST)
@pytest.mark.parametrize("codec", [Identity(), subspace(1.0), quantised(8)])
def test_one_bad_client_of_twenty_does_not_move_the_model(codec: object, aggregation: str) -> None:
    """Not even with 2^40 examples: everybody counts once."""
    honest = {i: values(i) for i in range(19)}
    ends = {}
    for name, bad in (("none", None), ("huge", 1e6), ("against", -50.0)):
        server = Server(INITIAL, codec, config=ServerConfig(aggregation=aggregation))  # type: ignore[arg-type]
        updates = dict(honest)
        if bad is not None:
            updates[19] = {n: bad * t for n, t in honest[0].items()}
        for client, update in updates.items():
            count = 1 << 40 if client == 19 else 1
            server.receive(toy.reply(server, client, update, count).to_bytes())
        server.close_round()
        ends[name] = moved(server)
    spread = torch.stack([flat(u) for u in honest.values()]).std(0).norm()
    for name in ("huge", "against"):
        apart = (ends[name] - ends["none"]).norm()
        assert 0 < apart < 0.35 * spread
    plain = Server(INITIAL, codec, config=ServerConfig())  # type: ignore[arg-type]
    close(plain, {**honest, 19: {n: 1e6 * t for n, t in honest[0].items()}})
    assert (moved(plain) - ends["none"]).norm() > 1e3 * spread


@pytest.mark.parametrize("aggregation", ROBUST)
def test_blocks_of_coordinates_change_no_bit(
    aggregation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for budget in (robust.BUDGET, 4 * 6 * 3):  # three coordinates of six clients at a time
        monkeypatch.setattr(robust, "BUDGET", budget)
        server = Server(INITIAL, Identity(), config=ServerConfig(aggregation=aggregation))
        close(server, {i: values(i) for i in range(6)})
        ends.append(server.replica.state())
    assert equal(*ends)


@pytest.mark.parametrize("codec", CODECS)
def test_equal_replies_are_their_own_robust_mean(codec: str) -> None:
    ends = []
    for aggregation in ("mean", *ROBUST):
        server = Server(INITIAL, CODECS[codec], config=ServerConfig(aggregation=aggregation))
        close(server, {i: values(3) for i in range(5)})
        ends.append(moved(server))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-5, atol=1e-6)


def test_a_reply_that_does_not_fit_is_refused_and_the_round_goes_on() -> None:
    probe = Server(INITIAL, Identity())
    size = len(toy.reply(probe, 0, values(0)).to_bytes())
    config = ServerConfig(aggregation="median", hold_bytes=int(3.5 * size))
    server = Server(INITIAL, Identity(), config=config)
    for client in range(3):
        server.receive(toy.reply(server, client, values(client)).to_bytes())
    with pytest.raises(UnexpectedReplyError, match="hold_bytes"):
        server.receive(toy.reply(server, 3, values(3)).to_bytes())
    server.close_round()
    whole = torch.stack([flat(values(i)) for i in range(3)])
    torch.testing.assert_close(moved(server), whole.median(0).values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trim", [0.0, 0.5, -1.0, float("nan")])
def test_a_share_that_cannot_be_cut_off_is_refused(trim: float) -> None:
    with pytest.raises(ConfigError, match="trim"):
        ServerConfig(aggregation="trimmed", trim=trim)


@pytest.mark.parametrize("aggregation", ["mean", "sum", "median"])
def test_a_share_beside_a_rule_that_cuts_nothing_off_is_refused(aggregation: str) -> None:
    with pytest.raises(ConfigError, match=f"aggregation 'trimmed', got '{aggregation}'"):
        ServerConfig(aggregation=aggregation, trim=0.2)


@pytest.mark.parametrize("aggregation", ROBUST)
def test_states_are_not_aggregated_so(aggregation: str) -> None:
    with pytest.raises(ConfigError, match=aggregation):
        ServerConfig(aggregation=aggregation, representation="state")


@pytest.mark.parametrize("aggregation", ROBUST)
def test_buffers_are_robust_too(aggregation: str) -> None:
    """Running statistics and counters travel bit for bit, and one client may forge them."""
    initial = {**INITIAL, "running_var": torch.ones(3), "num_batches": torch.tensor(4)}
    config = ServerConfig(aggregation=aggregation)
    server = Server(initial, quantised(8), config=config)
    for number in range(5):
        client = server.client(number)
        state = client.receive(server.broadcast(0))
        trained = {n: t.clone() for n, t in state.items()}
        trained["running_var"] += 1e9 if number == 4 else 0.1 * number
        trained["num_batches"] += 10**9 if number == 4 else 2
        server.receive(client.reply(trained, 1))
    server.close_round()
    state = server.replica.state()
    assert 1.0 <= float(state["running_var"].max()) <= 1.31
    assert int(state["num_batches"]) == 6
