"""Laws of aggregation: weights, momentum, feedback; a bad reply is named and changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from federated import toy
from federated.toy import CODECS, Toy, autoencoder, equal, quantised, subspace
from torch import Tensor

from gradcodec import layout
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, Identity
from gradcodec.errors import (
    ChecksumError,
    CodecMismatchError,
    ConfigError,
    MalformedBodyError,
    TrainingError,
    WireError,
)
from gradcodec.federated.client import Client
from gradcodec.federated.config import ServerConfig
from gradcodec.federated.envelope import Reply
from gradcodec.federated.server import Server
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.registry import make_codec

INITIAL = Toy().initial


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=generator) for n, t in INITIAL.items()}


def reply(server: Server, client: int, update: dict[str, Tensor], examples: int = 1) -> bytes:
    return toy.reply(server, client, update, examples).to_bytes()


def close(server: Server, *updates: dict[str, Tensor], examples: tuple[int, ...] = ()) -> bytes:
    for client, update in enumerate(updates):
        count = examples[client] if examples else 1
        server.receive(reply(server, client, update, count))
    return server.close_round()


def moved(server: Server) -> Tensor:
    """Distance from the initial state, as one float64 vector."""
    state = server.replica.state()
    return torch.cat([(state[n].double() - t.double()).reshape(-1) for n, t in INITIAL.items()])


def flat(update: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.double().reshape(-1) for t in update.values()])


def snapshot(server: Server) -> dict[str, Any]:
    return {
        "round": server.round,
        "state": server.replica.state(),
        "momentum": server.momentum.clone(),
        "residual": server.residual.clone(),
        "increments": list(server.increments),
        "replies": server.replies,
    }


def assert_unchanged(server: Server, before: dict[str, Any]) -> None:
    after = snapshot(server)
    assert equal(before.pop("state"), after.pop("state"))
    for name in ("momentum", "residual"):
        assert torch.equal(before.pop(name), after.pop(name))
    assert before == after


def test_replies_weigh_by_their_examples() -> None:
    server = Server(INITIAL, Identity())
    close(server, values(0), values(1), values(2), examples=(1, 2, 5))
    wanted = (flat(values(0)) + 2 * flat(values(1)) + 5 * flat(values(2))) / 8
    assert torch.allclose(moved(server), wanted, rtol=0, atol=2e-6)


def test_the_literal_reading_adds_replies_up() -> None:
    server = Server(INITIAL, Identity(), config=ServerConfig(aggregation="sum"))
    close(server, values(0), values(1), examples=(1, 7))
    assert torch.allclose(moved(server), flat(values(0)) + flat(values(1)), rtol=0, atol=2e-6)


@pytest.mark.parametrize("codec", ["identity", "subspace"])
@pytest.mark.parametrize("mode", ["post", "latent"])
@pytest.mark.parametrize(("lr", "momentum"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.9), (0.3, 0.5)])
def test_server_optimiser_equals_a_handwritten_one(
    codec: str, mode: str, lr: float, momentum: float
) -> None:
    config = ServerConfig(mode=mode, lr=lr, momentum=momentum)
    server = Server(INITIAL, CODECS[codec], config=config)
    position = velocity = torch.zeros(layout.flatten(INITIAL, server.replica.spec).numel())
    for number in range(4):
        pair = [values(2 * number), values(2 * number + 1)]
        close(server, *pair, examples=(3, 1))
        seen = [flat(server.uplink.decoder.decode(server.uplink.encoder.encode(u))) for u in pair]
        velocity = momentum * velocity + (3 * seen[0] + seen[1]) / 4
        position = position + lr * velocity
    assert float(position.norm()) > 1
    assert torch.allclose(moved(server), position.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("representation", ["state", "balanced"])
def test_states_are_averaged_as_states(representation: str) -> None:
    server = Server(INITIAL, Identity(), config=ServerConfig(representation=representation))
    for number in range(3):
        close(server, values(number), values(9), examples=(1, 3))
        wanted = (flat(values(number)) + 3 * flat(values(9))) / 4
        state = torch.cat([t.double().reshape(-1) for t in server.replica.state().values()])
        assert torch.allclose(state, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("hold", [0, 400, 1 << 20], ids=["none", "some", "all"])
@pytest.mark.parametrize("codec", ["identity", "subspace-int4"])
def test_the_order_of_arrival_does_not_matter(codec: str, hold: int) -> None:
    ends = set()
    for hold_bytes in (hold, 1 << 20):
        for order in (range(9), (4, 7, 2, 8, 0, 5, 1, 6, 3)):
            server = Server(INITIAL, CODECS[codec], config=ServerConfig(hold_bytes=hold_bytes))
            for client in order:
                # Of very different size: rounding as one goes would differ with the order.
                update = {n: t * 10.0**client for n, t in values(client).items()}
                server.receive(reply(server, client, update, client + 1))
            assert server.replies == tuple(range(9))
            ends.add(server.close_round())
    assert len(ends) == 1


def test_a_reply_in_the_running_sum_cannot_be_dropped_alone() -> None:
    server = Server(INITIAL, Identity(), config=ServerConfig(hold_bytes=0))
    for client in range(3):
        loud = {n: t * (client + 1) for n, t in values(0).items()}
        server.receive(reply(server, client, loud))
    with pytest.raises(ConfigError, match=r"running sum already.*abandon_round\(\)"):
        server.drop(0)
    server.drop(2)  # the loudest is held in any case
    assert server.replies == (0, 1)
    server.abandon_round()
    assert server.replies == ()
    server.receive(reply(server, 0, values(0)))
    server.close_round()


@pytest.mark.parametrize("codec", CODECS)
def test_everybody_sees_what_the_server_sees(codec: str) -> None:
    """The server moves by what its increment decodes to, not by what it wished to send."""
    server = Server(INITIAL, CODECS[codec])
    close(server, values(0))
    decoded = server.downlink.decoder.decode(server.downlink.encoder.encode(values(0)))
    if not CODECS[codec].linear:  # its update was decoded before it was encoded again
        decoded = server.downlink.decoder.decode(server.downlink.encoder.encode(decoded))
    assert torch.allclose(moved(server), flat(decoded), rtol=0, atol=1e-5)


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("mode", ["post", "latent"])
def test_feedback_makes_broadcasts_track_the_aggregates(feedback: bool, mode: str) -> None:
    server = Server(INITIAL, subspace(), quantised(2), ServerConfig(mode=mode, feedback=feedback))
    total = torch.zeros(moved(server).numel(), dtype=torch.float64)
    gaps, step = [], 0.0
    for number in range(30):
        update = {n: t + 0.5 for n, t in values(number).items()}
        close(server, update)
        seen = flat(server.uplink.decoder.decode(server.uplink.encoder.encode(update)))
        total, step = total + seen, max(step, float(seen.norm()))
        gaps.append(float((moved(server) - total).norm()))
    assert gaps[0] > 0.01 * step  # two bits do lose something
    if feedback:
        # What is missing is exactly the last residual, whatever the number of rounds.
        assert gaps[-1] == pytest.approx(float(server.residual.norm()), rel=1e-3)
        assert max(gaps) < step
    else:
        assert not server.residual.any()
        assert gaps[-1] > 2 * gaps[0]


def test_states_carry_no_feedback() -> None:
    server = Server(
        INITIAL, BlockQuant(BlockQuantConfig(2)), config=ServerConfig(representation="state")
    )
    close(server, values(0))
    assert not server.residual.any()


def twice(server: Server) -> bytes:
    return reply(server, 0, values(3))


def other_round(server: Server) -> bytes:
    return replace(toy.reply(server, 1, values(3)), round=server.round + 1).to_bytes()


def flipped(server: Server) -> bytes:
    blob = bytearray(reply(server, 1, values(3)))
    blob[60] ^= 4
    return bytes(blob)


def not_finite(server: Server) -> bytes:
    bad = {n: torch.full_like(t, torch.nan) for n, t in INITIAL.items()}
    return reply(server, 1, bad)


def other_base(server: Server) -> bytes:
    elsewhere = Server({n: t + 1 for n, t in INITIAL.items()}, Identity())
    payload = elsewhere.uplink.encoder.encode(values(3))
    return Reply(1, server.round, 1, payload).to_bytes()


def other_codec(server: Server) -> bytes:
    payload = Server(INITIAL, quantised()).uplink.encoder.encode(values(3))
    return Reply(1, server.round, 1, payload).to_bytes()


def unbound(server: Server) -> bytes:
    bound = toy.reply(server, 1, values(3))
    payload = replace(Identity().encoder.encode(values(3)), base=bound.payload.base)
    return replace(bound, payload=payload).to_bytes()


def cut(server: Server) -> bytes:
    return reply(server, 1, values(3))[:-2]


def no_examples(server: Server) -> bytes:
    return reply(server, 1, values(3), 0)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (twice, CodecMismatchError),
        (other_round, CodecMismatchError),
        (flipped, ChecksumError),
        (not_finite, MalformedBodyError),
        (other_base, CodecMismatchError),
        (other_codec, CodecMismatchError),
        (unbound, CodecMismatchError),
        (cut, ChecksumError),
        (no_examples, MalformedBodyError),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_bad_reply_is_named_and_changes_nothing(
    make: Callable[[Server], bytes], error: type[WireError]
) -> None:
    server = Server(INITIAL, Identity())
    close(server, values(0))
    server.receive(reply(server, 0, values(1), 2))
    before = snapshot(server)
    with pytest.raises(error):
        server.receive(make(server))
    assert_unchanged(server, before)
    server.close_round()


def test_a_reply_of_an_earlier_round_cannot_be_played_again() -> None:
    server = Server(INITIAL, Identity())
    old = reply(server, 0, values(0))
    server.receive(old)
    server.close_round()
    before = snapshot(server)
    with pytest.raises(CodecMismatchError, match="expected a reply to round 1, got 0"):
        server.receive(old)
    assert_unchanged(server, before)


def test_a_round_without_replies_cannot_be_closed() -> None:
    server = Server(INITIAL, Identity())
    before = snapshot(server)
    with pytest.raises(TrainingError, match="round 0"):
        server.close_round()
    assert_unchanged(server, before)


@pytest.mark.parametrize("uplink", [Identity(), autoencoder()], ids=["identity", "autoencoder"])
def test_an_aggregate_that_overflows_is_a_training_error(uplink: Any) -> None:
    config = ServerConfig(aggregation="sum", lr=1e39)
    server = Server(INITIAL, uplink, Identity(), config)
    huge = {n: torch.full_like(t, 1e10) for n, t in INITIAL.items()}
    server.receive(reply(server, 0, huge))
    before = snapshot(server)
    with pytest.raises(TrainingError, match="diverged"):
        server.close_round()
    assert_unchanged(server, before)


@pytest.mark.parametrize("version", [-1, 2])
def test_a_version_that_never_was_is_refused(version: int) -> None:
    server = Server(INITIAL, Identity())
    close(server, values(0))
    with pytest.raises(ConfigError, match=r"version of 0\.\.1"):
        server.broadcast(version)


def test_latent_mode_needs_one_code_space() -> None:
    with pytest.raises(ConfigError, match="code space"):
        Server(INITIAL, subspace(0.5), subspace(0.25), ServerConfig(mode="latent"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "'both'"),
        ({"representation": "gradient"}, "'gradient'"),
        ({"mode": "latent", "representation": "state"}, "latent mode sends updates"),
        ({"aggregation": "mode"}, "'mode'"),
        ({"lr": 0.0}, "lr > 0"),
        ({"lr": float("inf")}, "a finite lr > 0"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": float("nan")}, "momentum"),
        ({"representation": "state", "lr": 0.5}, "not on states"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**options)


@pytest.mark.parametrize("what", ["latent", "update", "state"])
@pytest.mark.parametrize("codec", CODECS)
def test_a_state_dict_restores_the_server_to_the_bit(codec: str, what: str) -> None:
    config = (
        ServerConfig(mode="latent", momentum=0.5)
        if what == "latent"
        else ServerConfig(representation=what)
    )
    server, again = (Server(INITIAL, CODECS[codec], config=config) for _ in range(2))
    for number in range(3):
        close(server, values(number))
    again.load_state_dict(server.state_dict())
    for one in (server, again):
        close(one, values(7))
    before = snapshot(server)
    before.pop("replies")
    after = snapshot(again)
    after.pop("replies")
    assert equal(before.pop("state"), after.pop("state"))
    assert all(torch.equal(before.pop(n), after.pop(n)) for n in ("momentum", "residual"))
    assert before == after


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("momentum"),
        lambda s: s.update(residual=torch.zeros(3)),
        lambda s: s["increment.000001"].add_(1),
    ],
    ids=["missing", "size", "damaged"],
)
def test_a_foreign_state_dict_changes_nothing(change: Callable[[dict[str, Tensor]], Any]) -> None:
    server, other = Server(INITIAL, quantised()), Server(INITIAL, quantised())
    for number in range(3):
        close(server, values(number))
    close(other, values(5))
    saved = server.state_dict()
    change(saved)
    before = snapshot(other)
    with pytest.raises((ConfigError, WireError)):
        other.load_state_dict(saved)
    assert_unchanged(other, before)


# -- a client that means harm -----------------------------------------------------------------

SPREAD = {"identity": Identity(), "codes": subspace(1.0)}


@pytest.mark.parametrize("codec", SPREAD.values(), ids=SPREAD)
def test_one_client_of_twenty_moves_the_model_by_its_share_at_most(codec: Codec) -> None:
    honest = [{n: 0.1 * t for n, t in values(i).items()} for i in range(19)]
    bound = 1.2 * max(float(flat(u).norm()) for u in honest)
    ends = {}
    for name, bad in (("honest", honest[0]), ("bad", {n: 1e6 * t for n, t in honest[0].items()})):
        server = Server(INITIAL, codec, config=ServerConfig(max_norm=bound))
        close(server, *honest, bad)
        ends[name] = moved(server)
    apart = float((ends["bad"] - ends["honest"]).norm())
    assert 0 < apart <= (bound - float(flat(honest[0]).norm())) / 20 * 1.001


@pytest.mark.parametrize("codec", SPREAD.values(), ids=SPREAD)
def test_a_bound_that_nobody_reaches_changes_no_bit(codec: Codec) -> None:
    ends = []
    for config in (ServerConfig(), ServerConfig(max_norm=1e4)):
        server = Server(INITIAL, codec, config=config)
        close(server, *(values(i) for i in range(4)))
        ends.append(server.replica.state())
    assert equal(*ends)


@pytest.mark.parametrize("bound", [0, -1.0, float("nan"), float("inf")])
def test_a_bound_that_is_none_is_refused(bound: float) -> None:
    with pytest.raises(ConfigError, match="max_norm"):
        ServerConfig(max_norm=bound)


# -- what is handed over ---------------------------------------------------------------------------


def test_ends_take_codecs_by_name() -> None:
    """As every other front end does."""
    named = Server(INITIAL, "int8", "int4")
    made = Server(INITIAL, make_codec("int8"), make_codec("int4"))
    update = values(1)
    assert close(named, update) == close(made, update)
    client = Client(1, INITIAL, "int8", "int4")
    assert equal(client.receive(named.broadcast(0)), made.replica.state())


@pytest.mark.parametrize("end", [Server, partial(Client, 1)])
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("int5",), "did you mean"),
        ((BlockQuantConfig(4),), "codec or its name"),
        (("int4", 4), "codec or its name"),
        (("int4", None, {"mode": "latent"}), "expected a ServerConfig"),
    ],
)
def test_what_is_no_codec_or_config_is_refused(
    end: Callable[..., object], arguments: tuple[Any, ...], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        end(INITIAL, *arguments)


@pytest.mark.parametrize("blob", [None, "text", 3])
def test_what_is_no_bytes_is_refused(blob: Any) -> None:
    with pytest.raises(ConfigError, match="expected the bytes of a reply"):
        Server(INITIAL, "int4").receive(blob)
    with pytest.raises(ConfigError, match="expected the bytes of a broadcast"):
        Client(1, INITIAL, "int4").receive(blob)
