"""Laws of a relay: replies go down as they came, and every client takes the server's step."""

import collections
import hashlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federated.toy import BIAS, CODECS, Toy, equal, reply
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import Identity, RotatedSign, Subspace
from gradcodec.errors import (
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
from gradcodec.federated.envelope import INCREMENT, SNAPSHOT, Broadcast, Reply
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


def played(server: Server, rounds: int = 3) -> Server:
    """Rounds of five replies by real clients."""
    for _ in range(rounds):
        for number in range(5):
            client = server.client(number, server.round)
            state, update = client.replica.state(), values(10 * server.round + number)
            server.receive(client.reply({n: t + update[n] for n, t in state.items()}, 1 + number))
        server.close_round()
    return server


RULES = {
    "mean": RELAY,
    "sum": replace(RELAY, aggregation="sum"),
    "median": replace(RELAY, aggregation="median"),
    "trimmed": replace(RELAY, aggregation="trimmed", trim=0.2),
    "rate": replace(RELAY, lr=0.3),
    "bounded": replace(RELAY, max_norm=0.5),
    "private": replace(RELAY, privacy=ClientPrivacy(clip=1.0, noise=0.1, seed=0)),
    "by name": replace(RELAY, rules=((BIAS, "fp32"),)),
    "latent": replace(RELAY, mode="latent"),
}
PAIRS = [*itertools.product(ALL, ("mean", "latent")), *itertools.product(["rotsign"], RULES)]


def latent(codec: Codec, server: Server) -> Server:
    """Rounds of five codes, as an optimiser would have trained them."""
    for _ in range(3):
        for number in range(5):
            client = server.client(number, server.round)
            code = torch.randn(
                client.codec.code_numel(client.replica.spec),
                generator=torch.Generator().manual_seed(10 * server.round + number),
            )
            payload = replace(client.codec.write_code(code), base=client.replica.digest)
            server.receive(Reply(number, server.round, 1 + number, payload).to_bytes())
        server.close_round()
    return server


def made(codec: str, rule: str, *, relay: bool = True) -> Server:
    """A federation after three rounds; without a relay it broadcasts what it averages in fp32."""
    config, up = replace(RULES[rule], relay=relay), ALL[codec]
    down: Codec | None = None
    if not relay:
        outer = up.outer if isinstance(up, Chain) else up
        down = Chain(outer, Identity()) if isinstance(outer, Subspace) else Identity()
        down = down if config.mode == "latent" else Identity()
    server = Server(INITIAL, up, down, config)
    return latent(up, server) if config.mode == "latent" else played(server)


@pytest.mark.parametrize(("codec", "rule"), PAIRS)
def test_nothing_is_lost_on_the_way_down(codec: str, rule: str) -> None:
    """The steps are those of a server that broadcasts in fp32, up to the rounding of fp32."""
    there, here = made(codec, rule).replica.state(), made(codec, rule, relay=False).replica.state()
    for name, t in here.items():
        torch.testing.assert_close(there[name], t, rtol=1e-5, atol=1e-5)
        assert float((t - INITIAL[name]).norm()) > 0.01


@pytest.mark.parametrize(("codec", "rule"), PAIRS)
def test_a_client_comes_to_the_servers_bits_by_any_way(codec: str, rule: str) -> None:
    server = made(codec, rule)
    late, whole = (Client(n, INITIAL, ALL[codec], config=RULES[rule]) for n in (1, 2))
    late.receive(server.broadcast())
    whole.receive(server.broadcast_whole())
    again = Client(1, INITIAL, ALL[codec], config=RULES[rule])
    again.receive(late.snapshot())
    again.receive(server.broadcast(again.version))
    steps = server.client(3, server.round)
    for client in (late, whole, again, steps):
        assert equal(client.replica.state(), server.replica.state())


OTHER = {
    "rate": replace(RELAY, lr=0.3),
    "bound": replace(RELAY, max_norm=0.1),
    "sum": replace(RELAY, aggregation="sum"),
    "median": replace(RELAY, aggregation="median"),
    "trim": replace(RELAY, aggregation="trimmed"),
    "privacy": replace(RELAY, privacy=ClientPrivacy(1.0, 0.1)),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_client_of_other_settings_is_told_so(name: str) -> None:
    """It would take another step from the same replies."""
    server, client = played(Server(INITIAL, FEW, config=RELAY), 1), client_of(OTHER[name])
    with pytest.raises(CodecMismatchError, match="a server with other settings"):
        client.receive(server.broadcast())
    assert client.version == 0


def test_equal_numbers_of_another_type_are_the_same_settings() -> None:
    server = played(Server(INITIAL, FEW, config=replace(RELAY, lr=1, max_norm=3)), 1)
    client = client_of(replace(RELAY, lr=1.0, max_norm=3.0))
    assert equal(client.receive(server.broadcast()), server.replica.state())


@pytest.mark.parametrize("name", OTHER)
def test_a_server_is_not_restarted_with_other_settings(name: str) -> None:
    state = played(Server(INITIAL, FEW, config=RELAY), 1).state_dict()
    with pytest.raises(CodecMismatchError, match="a server with other settings"):
        Server(INITIAL, FEW, config=OTHER[name]).load_state_dict(state)


def test_a_relays_state_is_not_one_of_another_federation() -> None:
    state = played(Server(INITIAL, FEW, config=RELAY), 1).state_dict()
    with pytest.raises(CodecMismatchError, match=r"both ends need the same ServerConfig\.relay"):
        Server(INITIAL, FEW).load_state_dict(state)


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
    assert bodies < len(blob) <= bodies + 52 + 2 * len(replies)
    assert Broadcast.from_bytes(blob).payload_nbytes == bodies


def test_one_round_of_many_replies_goes_down_as_a_snapshot_where_that_is_shorter() -> None:
    server = played(Server(INITIAL, Identity(), config=RELAY), 1)
    message = Broadcast.from_bytes(server.broadcast())
    assert [kind for kind, _ in message.parts] == [SNAPSHOT]
    client = Client(1, INITIAL, Identity(), config=RELAY)
    assert equal(client.receive(server.broadcast()), server.replica.state())


def test_the_order_of_arrival_changes_no_byte() -> None:
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
    assert len(list(Relayed.from_bytes(increment))) == 1
    client = Client(2, INITIAL, Identity(), config=config)
    assert equal(client.receive(server.broadcast()), server.replica.state())


def test_a_reply_that_was_dropped_by_hand_or_abandoned_is_not_sent_on() -> None:
    server = Server(INITIAL, FEW, config=RELAY)
    server.receive(reply(server, 0, values(0)).to_bytes())
    server.abandon_round()
    for client in (1, 2):
        server.receive(reply(server, client, values(client)).to_bytes())
    server.drop(1)
    (found,) = Relayed.from_bytes(server.close_round())
    assert found == (1, reply(Server(INITIAL, FEW), 2, values(2)).payload.body)


def test_a_sum_that_leaves_fp32_is_refused() -> None:
    """A server drops replies before it sends such a round on; here one sends it all the same."""
    config = replace(RELAY, aggregation="sum")
    server = Server(INITIAL, Identity(), config=config)
    huge = {n: torch.full(t.shape, 3e38) for n, t in INITIAL.items()}
    replies = [(1, reply(server, 0, huge).payload)] * 2
    blob = Relayed.of(server.replica.lineage, config.rule, replies).to_bytes()
    client = Client(1, INITIAL, Identity(), config=config)
    with pytest.raises(MalformedBodyError, match="NaN or Inf"):
        client.replica.apply([(INCREMENT, blob)], 1, None)
    assert client.version == 0


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
        ({"hold_bytes": 0}, "expected hold_bytes above 0"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**{"relay": True, **settings})


def test_a_relay_has_no_downlink_codec() -> None:
    with pytest.raises(ConfigError, match="expected no downlink beside RotatedSign"):
        Server(INITIAL, FEW, "int4", RELAY)


def client_of(config: ServerConfig) -> Client:
    return Client(1, INITIAL, FEW, config=config)


def test_both_ends_must_agree_on_it() -> None:
    for one, other in itertools.permutations((RELAY, ServerConfig())):
        server = played(Server(INITIAL, FEW, config=one), 1)
        with pytest.raises(CodecMismatchError, match="both ends need the same"):
            client_of(other).receive(server.broadcast())


def increment() -> bytes:
    server = Server(INITIAL, FEW, config=RELAY)
    for client in range(2):
        server.receive(reply(server, client, values(client), 200 + client).to_bytes())
    return server.close_round()


def nan() -> bytes:
    """Scales that are not finite in the first reply."""
    found = Relayed.from_bytes(increment())
    at = 2 + 4  # behind its weight and its seed
    scales = b"\xc0\x7f" * ((found.length - 4) // 2)
    bad = found.replies[:at] + scales + found.replies[at + len(scales) :]
    return replace(found, replies=bad).to_bytes()


HEAD = 29
"""Bytes before the replies: magic, version, base, rule, codec, digest, length."""
BAD = {
    "another version": (lambda b: b[:2] + b"\2" + b[3:], UnsupportedVersionError),
    "another history": (lambda b: b[:3] + bytes(8) + b[11:], CodecMismatchError),
    "other settings": (lambda b: b[:11] + bytes(8) + b[19:], CodecMismatchError),
    "no such codec": (lambda b: b[:19] + b"\xff" + b[20:], UnknownCodecError),
    "another codec's": (lambda b: b[:19] + b"\2" + b[20:], CodecMismatchError),
    "another digest": (lambda b: b[:20] + bytes(8) + b[28:], CodecMismatchError),
    "another length": (lambda b: b[:28] + b"\1" + b[HEAD:], MalformedBodyError),
    "longer than it is": (lambda b: b[:28] + b"\xff\xff\xff\x7f" + b[HEAD:], TruncatedError),
    "no replies": (lambda b: b[:HEAD], MalformedBodyError),
    "no weight": (lambda b: b[:HEAD] + b"\0" + b[HEAD + 2 :], MalformedBodyError),
    "cut off": (lambda b: b[:-1], TruncatedError),
    "not finite": (lambda b: nan(), MalformedBodyError),
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


SAMPLE = increment()


@pytest.mark.parametrize("rule", ["sum", "median", "private"])
def test_a_weight_where_every_reply_counts_once_is_refused(rule: str) -> None:
    config = RULES[rule]
    found = Relayed.from_bytes(played(Server(INITIAL, FEW, config=config), 1).increments[0])
    assert found.replies[0] == 1
    bad = replace(found, replies=b"\x09" + found.replies[1:]).to_bytes()
    with pytest.raises(MalformedBodyError, match="expected a weight of 1, got 9"):
        client_of(config).replica.apply([(INCREMENT, bad)], 1, None)


#: A bit of a sign or a scale leaves a body that can be read; anything else is an error.
PLACES = st.one_of(st.integers(0, len(SAMPLE) - 1), st.integers(HEAD, len(SAMPLE) - 1))
ENDS = st.one_of(st.just(len(SAMPLE)), st.just(len(SAMPLE)), st.integers(0, len(SAMPLE)))


@settings(max_examples=200)
@given(st.lists(st.tuples(PLACES, st.integers(0, 255)), max_size=4), ENDS)
@example([(HEAD + 8, 0x3F)], len(SAMPLE))
def test_any_bytes_raise_named_errors_only(changes: list[tuple[int, int]], end: int) -> None:
    blob = bytearray(SAMPLE)
    for place, byte in changes:
        blob[place] = byte
    blob = blob[:end]
    client = client_of(RELAY)
    message = Broadcast(1, ((INCREMENT, bytes(blob)),), hashlib.sha256(blob).digest()[:8])
    try:
        client.receive(message.to_bytes())
    except WireError:
        assert client.version == 0
    assert client.version == (client.replica.lineage == message.lineage)
    assert all(bool(torch.isfinite(t).all()) for t in client.replica.state().values())


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
