"""Laws of histories: who lost rounds, or heard others, is told so, and finds a way back."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from federated.toy import CODECS, Toy, equal, quantised, reply
from torch import Tensor

from gradcodec.codecs import Identity
from gradcodec.errors import CodecMismatchError, ConfigError
from gradcodec.federated import AutoClient, AutoConfig, AutoServer, Client, Server, ServerConfig
from gradcodec.federated.envelope import INCREMENT, SNAPSHOT, Broadcast, Reply
from gradcodec.transforms.subspace.config import SubspaceConfig

INITIAL = {"w": torch.zeros(4)}
GOLDEN = Path(__file__).parents[1] / "golden" / "federation-1.json"


def server_at(*values: float) -> Server:
    """A server whose rounds moved ``w`` by these."""
    server = Server(INITIAL, Identity())
    for value in values:
        server.receive(reply(server, 0, {"w": torch.full((4,), float(value))}).to_bytes())
        server.close_round()
    return server


def client_of(server: Server) -> Client:
    client = Client(1, INITIAL, Identity())
    client.receive(server.broadcast(0))
    return client


def back(client: Client, server: Server) -> Tensor:
    """The way that errors name."""
    client.reset()
    return client.receive(server.broadcast(client.version))["w"]


# -- a server that was restarted from an older checkpoint ----------------------------------------


def restarted() -> tuple[Server, Client]:
    """Both at round 2: the server after 1 + 7, its client after 1 + 2."""
    before = server_at(1, 2)
    client = client_of(before)
    server = server_at(1)
    server.receive(reply(server, 0, {"w": torch.full((4,), 7.0)}).to_bytes())
    server.close_round()
    assert (server.round, client.version) == (2, 2)
    return server, client


def test_a_reply_trained_on_a_lost_round_is_refused() -> None:
    server, client = restarted()
    blob = client.reply({"w": torch.full((4,), 4.0)}, 1)
    with pytest.raises(CodecMismatchError, match=r"another history.*client\.reset\(\)"):
        server.receive(blob)
    assert server.replies == ()


@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_broadcast_to_a_client_of_a_lost_round_is_refused_or_leads_to_the_server(
    more: int,
) -> None:
    server, client = restarted()
    for _ in range(more):
        server.receive(reply(server, 0, {"w": torch.ones(4)}).to_bytes())
        server.close_round()
    blob = server.broadcast(client.version)
    if any(kind == SNAPSHOT for kind, _ in Broadcast.from_bytes(blob).parts):
        client.receive(blob)  # a whole position needs no history
    else:
        with pytest.raises(CodecMismatchError, match=r"history.*client\.reset\(\)"):
            client.receive(blob)
        assert (client.version, client.replica.position.tolist()) == (2, [3.0] * 4)
        back(client, server)
    assert client.version == server.round
    assert torch.equal(client.replica.position, server.replica.position)
    server.receive(client.reply({"w": client.replica.state()["w"] + 1}, 1))


def test_a_client_ahead_of_a_restarted_server_finds_back() -> None:
    client = client_of(server_at(1, 2, 3))
    server = server_at(1)
    with pytest.raises(ConfigError, match=r"0\.\.1, got 3.*client\.reset\(\)"):
        server.broadcast(client.version)
    with pytest.raises(CodecMismatchError, match=r"round 1 came to a replica at round 3"):
        client.receive(server.broadcast(0))
    assert back(client, server).tolist() == [1.0] * 4


# -- increments in another order, twice, or late -------------------------------------------------


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 0, 0), (0, 2, 1), (2, 2, 2)])
def test_increments_in_another_order_are_refused(order: tuple[int, ...]) -> None:
    server = server_at(1, 2, 4)
    client = Client(1, INITIAL, Identity())
    parts = tuple((INCREMENT, server.increments[i]) for i in order)
    with pytest.raises(CodecMismatchError, match="another history"):
        client.receive(Broadcast(3, parts, server.replica.lineage).to_bytes())
    assert (client.version, client.replica.position.tolist()) == (0, [0.0] * 4)


def test_a_checkpoint_with_increments_in_another_order_is_refused() -> None:
    server = server_at(1, 2, 4)
    state = server.state_dict()
    first, second = "increment.000000", "increment.000001"
    state[first], state[second] = state[second], state[first]
    again = Server(INITIAL, Identity())
    with pytest.raises(CodecMismatchError, match="another history"):
        again.load_state_dict(state)
    assert again.round == 0


def test_a_delayed_snapshot_does_not_lead_a_client_back() -> None:
    server = server_at(1, 2)
    delayed = server.broadcast(0)
    assert Broadcast.from_bytes(delayed).parts[0][0] == SNAPSHOT
    client = client_of(server)
    server.receive(reply(server, 0, {"w": torch.ones(4)}).to_bytes())
    server.close_round()
    client.receive(server.broadcast(2))
    with pytest.raises(CodecMismatchError, match="it was delayed"):
        client.receive(delayed)
    assert (client.version, client.replica.position.tolist()) == (3, [4.0] * 4)


@pytest.mark.parametrize("version", [0, 1])
def test_a_broadcast_that_comes_twice_changes_nothing_the_second_time(version: int) -> None:
    server = server_at(1, 2)
    client = Client(1, INITIAL, Identity())
    if version:
        client.receive(server_at(1).broadcast(0))
    blob = server.broadcast(version)
    client.receive(blob)
    before = client.replica.position
    with suppress(CodecMismatchError):
        client.receive(blob)
    assert client.version == 2
    assert torch.equal(client.replica.position, before)


def test_a_snapshot_of_another_history_at_the_same_round_is_refused() -> None:
    server, client = restarted()
    whole = server.replica.snapshot().to_bytes()
    with pytest.raises(CodecMismatchError, match=r"client\.reset\(\)"):
        client.receive(Broadcast(2, ((SNAPSHOT, whole),), server.replica.lineage).to_bytes())
    assert client.replica.position.tolist() == [3.0] * 4


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("what", ["latent", "update", "state"])
def test_every_state_of_a_federation_has_a_digest_of_its_own(codec: str, what: str) -> None:
    config = ServerConfig(mode="latent") if what == "latent" else ServerConfig(representation=what)
    server = Server(Toy().initial, CODECS[codec], config=config)
    seen = [server.replica.digest]
    for _ in range(3):
        server.receive(reply(server, 0, Toy().initial).to_bytes())
        server.close_round()
        client = server.client(0)
        client.receive(server.broadcast(0))
        assert client.replica.digest == server.replica.digest
        seen.append(server.replica.digest)
    assert len(set(seen)) == 4


# -- subspace:auto -------------------------------------------------------------------------------

AUTO = AutoConfig(warmup_rounds=1, subspace=SubspaceConfig(ratio=2))


def auto_at(rounds: int, seed: int) -> AutoServer:
    server = AutoServer(Toy().initial, AUTO)
    g = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        for client in range(3):
            update = {n: torch.randn(t.shape, generator=g) for n, t in Toy().initial.items()}
            server.receive(reply(server, client, update).to_bytes())
        server.close_round()
    return server


@pytest.mark.parametrize("rounds", [(2, 2), (3, 1), (3, 2), (1, 3)])
def test_a_client_of_another_subspace_history_finds_back(rounds: tuple[int, int]) -> None:
    client = AutoClient(0, Toy().initial, AUTO)
    client.receive(auto_at(rounds[0], seed=1).broadcast(0))
    server = auto_at(rounds[1], seed=2)
    with pytest.raises((CodecMismatchError, ConfigError)):
        client.receive(server.broadcast(client.version))
    assert client.version == rounds[0]
    client.reset()
    assert (client.version, client.config.mode) == (0, "post")
    state = client.receive(server.broadcast(0))
    assert equal(dict(state), server.replica.state())
    assert client.codec.digest == server.uplink.digest


# -- version 1 -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict[str, object]:
    """Three rounds of a federation of two, as a release with envelopes of version 1 wrote them."""
    loaded: dict[str, object] = json.loads(GOLDEN.read_text())
    return loaded


def of_record() -> dict[str, Tensor]:
    return {"w": torch.arange(4.0), "b": torch.tensor([[1.0], [-2.0]], dtype=torch.bfloat16)}


def test_recorded_broadcasts_of_version_1_lead_where_they_led(recorded: dict) -> None:
    client = Client(3, of_record(), Identity())
    for before, row in zip([None, *recorded["rounds"]], recorded["rounds"], strict=False):
        state = client.receive(bytes.fromhex(row["broadcast"]))
        if before is not None:
            assert {n: t.double().flatten().tolist() for n, t in state.items()} == before["state"]
    other = Client(3, of_record(), Identity())
    state = other.receive(bytes.fromhex(recorded["snapshot"]))
    last = recorded["rounds"][-1]["state"]
    assert {n: t.double().flatten().tolist() for n, t in state.items()} == last


def test_recorded_replies_of_version_1_are_aggregated(recorded: dict) -> None:
    server = Server(of_record(), Identity())
    for row in recorded["rounds"]:
        for blob in row["replies"]:
            server.receive(bytes.fromhex(blob))
        assert server.replies == (3, 70000)
        server.close_round()
        state = server.replica.state()
        assert {n: t.double().flatten().tolist() for n, t in state.items()} == row["state"]


def test_a_checkpoint_of_version_1_goes_on(recorded: dict) -> None:
    saved = {
        n: torch.frombuffer(
            bytearray.fromhex(t), dtype=torch.uint8 if n.startswith("inc") else torch.float32
        )
        for n, t in recorded["state_dict"].items()
    }
    server = Server(of_record(), Identity())
    server.load_state_dict(saved)
    assert server.round == 3
    last = recorded["rounds"][-1]["state"]
    client = Client(0, of_record(), Identity())
    state = client.receive(server.broadcast(0))
    assert {n: t.double().flatten().tolist() for n, t in state.items()} == last
    server.receive(client.reply(state, 1))
    server.close_round()
    client.receive(server.broadcast(3))


def test_a_version_1_broadcast_is_refused_after_newer_ones(recorded: dict) -> None:
    server = Server(of_record(), Identity())
    client = Client(3, of_record(), Identity())
    client.receive(server.broadcast(0))
    with pytest.raises(CodecMismatchError, match="version 1 after newer ones"):
        client.receive(bytes.fromhex(recorded["rounds"][1]["broadcast"]))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: replace(r, payload=replace(r.payload, base=None)),
        lambda r: replace(r, payload=replace(r.payload, base=b"12345678")),
    ],
    ids=["none", "another"],
)
def test_a_reply_without_its_state_is_refused(change: Callable[[Reply], Reply]) -> None:
    server = Server(Toy().initial, quantised())
    with pytest.raises(CodecMismatchError, match="expected an update of the base"):
        server.receive(change(reply(server, 0, Toy().initial)).to_bytes())
