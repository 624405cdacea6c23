"""Laws of a relay: replies go down as they came, and every client takes the server's step."""

import collections
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federated.toy import CODECS, B, Toy, equal, reply
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradcodec.codecs import Identity, RotatedSign
from gradcodec.errors import (
    BadMagicError,
    CodecMismatchError,
    ConfigError,
    MalformedBodyError,
    TruncatedError,
    UnexpectedReplyError,
    UnknownCodecError,
    UnsupportedVersionError,
    WireError,
)
from gradcodec.federated import Client, Federation, LoopConfig, Server, ServerConfig
from gradcodec.federated.envelope import INCREMENT, SNAPSHOT, Broadcast
from gradcodec.federated.relayed import Relayed
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.privacy import ClientPrivacy

RELAY = ServerConfig(relay=True)
INITIAL = Toy().initial
FEW = RotatedSign(RotatedSignConfig(64, 4, "largest"))
ALL = {**CODECS, "rotsign": FEW}
GOLDEN = bytes.fromhex((Path(__file__).parents[1] / "golden" / "relay-1.hex").read_text())


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator) for n, t in INITIAL.items()}


def played(server: Server, rounds: int = 3, clients: int = 3) -> Server:
    for _ in range(rounds):
        for client in range(clients):
            update = values(10 * server.round + client)
            server.receive(reply(server, client, update, 1 + client).to_bytes())
        server.close_round()
    return server


RULES = {
    "mean": RELAY,
    "sum": replace(RELAY, aggregation="sum"),
    "median": replace(RELAY, aggregation="median"),
    "trimmed": replace(RELAY, aggregation="trimmed", trim=0.4),
    "rate": replace(RELAY, lr=0.3),
    "bounded": replace(RELAY, max_norm=0.5),
    "private": replace(RELAY, privacy=ClientPrivacy(1.0, 0.1)),
}


@pytest.mark.parametrize(
    ("codec", "rule"), [*((c, "mean") for c in ALL), *(("rotsign", r) for r in RULES)]
)
def test_a_client_comes_to_the_servers_bits_by_any_way(codec: str, rule: str) -> None:
    """Round by round, and all at once."""
    config = RULES[rule]
    server = Server(INITIAL, ALL[codec], config=config)
    each, late = (Client(n, INITIAL, ALL[codec], config=config) for n in (1, 2))
    for _ in range(3):
        played(server, 1)
        each.receive(server.broadcast(each.version))
    late.receive(server.broadcast())
    assert not equal(server.replica.state(), INITIAL)
    assert equal(each.replica.state(), server.replica.state())
    assert equal(late.replica.state(), server.replica.state())


@pytest.mark.parametrize("codec", ALL)
def test_latent_rounds_are_relayed_too(codec: str) -> None:
    config = replace(RELAY, mode="latent")
    server = played(Server(INITIAL, ALL[codec], config=config))
    client = Client(1, INITIAL, ALL[codec], config=config)
    client.receive(server.broadcast())
    assert equal(client.replica.state(), server.replica.state())


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"private"}))
def test_nothing_is_lost_on_the_way_down(rule: str) -> None:
    """The step is that of a server that broadcasts in fp32."""
    config = RULES[rule]
    there = played(Server(INITIAL, FEW, config=config))
    here = played(Server(INITIAL, FEW, Identity(), replace(config, relay=False)))
    for name, t in here.replica.state().items():
        torch.testing.assert_close(there.replica.state()[name], t)


def test_a_broadcast_takes_the_bytes_of_the_replies() -> None:
    model = nn.Linear(100, 100)
    server = Server(model, FEW, config=RELAY)
    update = {n: p.detach() for n, p in model.named_parameters()}
    replies = [reply(server, client, update) for client in range(5)]
    for one in replies:
        server.receive(one.to_bytes())
    server.close_round()
    bodies = sum(len(one.payload.body) for one in replies)
    blob = server.broadcast()
    assert bodies < len(blob) <= bodies + 44 + 4 * len(replies)
    assert Broadcast.from_bytes(blob).payload_nbytes == bodies


def test_one_round_of_many_replies_goes_down_as_a_snapshot_where_that_is_shorter() -> None:
    server = played(Server(INITIAL, Identity(), config=RELAY), rounds=1)
    message = Broadcast.from_bytes(server.broadcast())
    assert [kind for kind, _ in message.parts] == [SNAPSHOT]
    client = Client(1, INITIAL, Identity(), config=RELAY)
    assert equal(client.receive(server.broadcast()), server.replica.state())


def test_neither_the_order_of_arrival_nor_who_sent_what_is_told() -> None:
    blobs = set()
    for order in itertools.permutations(range(3)):
        server = Server(INITIAL, FEW, config=RELAY)
        for client, seed in enumerate(order):
            server.receive(reply(server, client, values(seed)).to_bytes())
        blobs.add(server.close_round())
    assert len(blobs) == 1


def test_a_dropped_reply_is_not_sent_on() -> None:
    """Two that are finite each, and whose sum is not, one of them alone."""
    config = replace(RELAY, aggregation="sum")
    server = Server(INITIAL, Identity(), config=config)
    huge = {n: torch.full(t.shape, 3e38) for n, t in INITIAL.items()}
    server.receive(reply(server, 0, huge).to_bytes())
    server.receive(reply(server, 1, {n: 0.9 * t for n, t in huge.items()}).to_bytes())
    increment = server.close_round()
    assert server.dropped == (0,)
    assert len(Relayed.from_bytes(increment).replies) == 1
    client = Client(2, INITIAL, Identity(), config=config)
    assert equal(client.receive(server.broadcast()), server.replica.state())


def test_a_restarted_server_goes_on_with_the_same_bits() -> None:
    first = played(Server(INITIAL, FEW, config=RELAY))
    again = Server(INITIAL, FEW, config=RELAY)
    again.load_state_dict(first.state_dict())
    assert equal(again.replica.state(), first.replica.state())
    assert played(again, 1).broadcast(3) == played(first, 1).broadcast(3)


def test_tensors_that_are_not_coded_travel_beside_the_replies() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))

    server = Server(network(), FEW, config=RELAY)
    for number in range(2):
        client, model = server.client(number), network()
        model(torch.randn(16, 8, generator=torch.Generator().manual_seed(number)))
        server.receive(client.reply(model, 3))
    server.close_round()
    late = Client(9, network(), FEW, config=RELAY)
    assert equal(late.receive(server.broadcast()), server.replica.state())
    assert int(server.replica.state()["1.num_batches_tracked"]) == 1


def test_a_federation_learns_by_relay() -> None:
    task = Toy()
    server = Server(task.initial, FEW, config=RELAY)
    before = task.evaluate()
    reports = list(Federation(task, server, LoopConfig(20, range(6), 3)).run())
    assert reports[-1].loss < 0.5 * before
    assert all(0 < r.downlink_payload_bytes < r.downlink_bytes for r in reports[1:])


def test_replies_that_a_round_cannot_hold_are_refused() -> None:
    config = replace(RELAY, hold_bytes=200)
    server = Server(INITIAL, FEW, config=config)
    server.receive(reply(server, 0, values(0)).to_bytes())
    replies = (reply(server, client, values(client)).to_bytes() for client in range(1, 9))
    with pytest.raises(UnexpectedReplyError, match="a relay needs all replies"):
        collections.deque(map(server.receive, replies), maxlen=0)
    server.close_round()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 0.9}, "expected momentum 0, got 0.9"),
        ({"representation": "state"}, "sends updates on, not 'state'"),
        ({"privacy": ClientPrivacy(1.0, 0.1, shares=4)}, "expected shares=1, or no relay"),
        ({"relay": 1}, "True or False"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**{"relay": True, **settings})


def test_a_relay_has_no_downlink_codec() -> None:
    with pytest.raises(ConfigError, match="expected no downlink, got 'int4'"):
        Server(INITIAL, FEW, "int4", RELAY)


def test_both_ends_must_agree_on_it() -> None:
    relay = played(Server(INITIAL, FEW, config=RELAY), 1)
    plain = played(Server(INITIAL, FEW), 1)
    with pytest.raises(CodecMismatchError, match="without ServerConfig"):
        Client(1, INITIAL, FEW).receive(relay.broadcast())
    with pytest.raises(BadMagicError, match="both ends need the same"):
        Client(1, INITIAL, FEW, config=RELAY).receive(plain.broadcast())


def increment() -> bytes:
    server = Server(INITIAL, FEW, config=RELAY)
    for client in range(2):
        server.receive(reply(server, client, values(client), 200 + client).to_bytes())
    return server.close_round()


def nan() -> bytes:
    found = Relayed.from_bytes(increment())
    weight, body = found.replies[0]
    scales = b"\xc0\x7f" * ((len(body) - 4) // 2)
    bad = (weight, body[:4] + scales + body[4 + len(scales) :])
    return replace(found, replies=(bad, *found.replies[1:])).to_bytes()


BAD = {
    "another version": (lambda b: b[:2] + b"\2" + b[3:], UnsupportedVersionError),
    "no such codec": (lambda b: b[:11] + b"\xff" + b[12:], UnknownCodecError),
    "another codec's": (lambda b: b[:11] + b"\2" + b[12:], CodecMismatchError),
    "another digest": (lambda b: b[:12] + b"\0" + b[13:], CodecMismatchError),
    "no replies": (lambda b: b[:20], MalformedBodyError),
    "no weight": (lambda b: b[:20] + b"\0" + b[22:], MalformedBodyError),
    "cut off": (lambda b: b[:-1], TruncatedError),
    "longer than it is": (lambda b: b[:22] + b"\xff\xff\xff\x7f", TruncatedError),
    "not finite": (lambda b: nan(), MalformedBodyError),
    "another history": (lambda b: b[:3] + b"\0" * 8 + b[11:], CodecMismatchError),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_relay_is_named_and_changes_nothing(name: str) -> None:
    damage, error = BAD[name]
    client = Client(1, INITIAL, FEW, config=RELAY)
    blob = damage(increment())
    with pytest.raises(error):
        client.replica.apply([(INCREMENT, blob)], 1, None)
    assert client.version == 0
    assert equal(client.replica.state(), INITIAL)


@settings(max_examples=200)
@given(st.data())
def test_any_bytes_raise_named_errors_only(data: st.DataObject) -> None:
    blob = bytearray(increment())
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    blob = blob[: data.draw(st.integers(0, len(blob)))]
    client = Client(1, INITIAL, FEW, config=RELAY)
    try:
        client.replica.advance(bytes(blob))
    except WireError:
        assert client.version == 0


def test_the_golden_relay_is_read_and_written() -> None:
    """Two replies of one value in fp32: 2 with weight 3, and -6 with weight 300."""
    config = replace(RELAY, lr=0.5)
    initial = {"w": torch.zeros(1)}
    server = Server(initial, Identity(), config=config)
    for client, (value, examples) in enumerate(((-6.0, 300), (2.0, 3))):
        one = reply(server, client, {"w": torch.tensor([value])}, examples)
        server.receive(one.to_bytes())
    blob = server.close_round()
    assert blob == GOLDEN
    client = Client(1, initial, Identity(), config=config)
    client.replica.advance(GOLDEN)
    assert client.replica.state()["w"].item() == 0.5 * torch.tensor(-1794 / 303).item()


def test_the_last_layer_really_moves() -> None:
    """What the laws above compare is not zero."""
    moved = played(Server(INITIAL, FEW, config=RELAY)).replica.state()
    assert float((moved[B] - INITIAL[B]).norm()) > 0.1
