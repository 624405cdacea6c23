"""Laws of ``subspace:auto``: it needs no preparation, and all stay in step over every switch."""

import json
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from federated.toy import Toy, equal, quantised, spec, subspace, timeless
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.errors import (
    ChecksumError,
    CodecMismatchError,
    ConfigError,
    LimitError,
    MalformedBodyError,
    TrailingBytesError,
    TrainingError,
    TruncatedError,
    WireError,
)
from gradcodec.faf import LatentOptimizer
from gradcodec.federated import AutoClient, AutoConfig, AutoServer, checkpoint, server_for
from gradcodec.federated.client import Client
from gradcodec.federated.config import ServerConfig
from gradcodec.federated.envelope import (
    CODEC,
    INCREMENT,
    KINDS,
    SNAPSHOT,
    Broadcast,
    Reply,
    part_nbytes,
)
from gradcodec.federated.loop import Federation, LoopConfig, RoundReport
from gradcodec.federated.participants import ClientId
from gradcodec.federated.server import Server
from gradcodec.federated.switch import MAX_SETTINGS_BYTES, Switch
from gradcodec.registry import make_codec
from gradcodec.tgap import SignalMoments, fit_subspace, moments
from gradcodec.transforms.autoencoder.config import AutoencoderConfig
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.wire import Payload

SUBSPACE = SubspaceConfig(ratio=2, allocation="tempered")
PLAIN = AutoConfig(warmup_rounds=2, subspace=SUBSPACE)
REFRESHED = AutoConfig(warmup_rounds=2, subspace=SUBSPACE, refresh_rounds=(5, 8), momentum=0.5)
CONFIGS = {"once": PLAIN, "refreshed": REFRESHED}
ROUNDS = 12


class Spy(AutoServer):
    """Keeps every message."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.up: list[bytes] = []
        self.down: list[bytes] = []

    def receive(self, blob: bytes, *, sender: ClientId | None = None) -> Reply:
        self.up.append(blob)
        return super().receive(blob, sender=sender)

    def broadcast(self, version: int = 0) -> bytes:
        self.down.append(super().broadcast(version))
        return self.down[-1]


def make(config: AutoConfig = PLAIN, rounds: int = ROUNDS, task: Toy | None = None) -> Federation:
    task = task or Toy()
    return Federation(task, Spy(task.initial, config), LoopConfig(rounds, range(6), 3, seed=1))


def messages(federation: Federation) -> tuple[list[bytes], list[bytes]]:
    spy = federation.server
    assert isinstance(spy, Spy)
    return spy.up, spy.down


class World:
    """The steps of a federation one by one, with clients that come when a test says so."""

    def __init__(self, config: AutoConfig = PLAIN) -> None:
        self.task = Toy()
        self.config = config
        self.server = AutoServer(self.task.initial, config)
        self.clients: dict[int, AutoClient] = {}
        self.received: dict[int, list[bytes]] = {}

    def deliver(self, number: int) -> AutoClient:
        """A client derives the initial state itself; all else reaches it as bytes."""
        if number not in self.clients:
            self.clients[number] = AutoClient(number, Toy().initial, self.config)
        client = self.clients[number]
        blob = self.server.broadcast(client.version)
        self.received.setdefault(number, []).append(blob)
        client.receive(blob)
        return client

    def train(self, number: int) -> bytes:
        client, task = self.clients[number], self.task
        with torch.no_grad():
            for name, t in client.replica.state().items():
                task.parameters[name].copy_(t)
        optimizer: torch.optim.Optimizer
        if client.config.mode == "latent":
            optimizer = LatentOptimizer(task.parameters, client.codec, torch.optim.SGD, lr=0.05)
        else:
            optimizer = torch.optim.SGD(task.parameters.values(), lr=0.05)
        result = task.train(number, client.version, optimizer)
        latent = isinstance(optimizer, LatentOptimizer)
        return client.reply(optimizer if latent else task.initial, result.examples)

    def round(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.deliver(number)
            self.server.receive(self.train(number))
        self.server.close_round()

    def to_round(self, number: int) -> "World":
        while self.server.round < number:
            self.round((0, 1, 2))
        return self


def parts(blob: bytes) -> tuple[tuple[int, bytes], ...]:
    return Broadcast.from_bytes(blob, KINDS).parts


def kinds(blob: bytes) -> list[int]:
    return [kind for kind, _ in parts(blob)]


def assert_in_step(client: Client, server: Server) -> None:
    assert client.version == server.round
    assert client.config.mode == server.config.mode
    assert client.codec.digest == server.uplink.digest
    assert client.codec.base == server.uplink.base
    assert torch.equal(client.replica.position, server.replica.position)
    assert equal(client.replica.initial, server.replica.initial)
    assert equal(client.replica.state(), server.replica.state())


# -- what it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_learns_without_any_preparation(config: AutoConfig) -> None:
    federation = make(config)
    start = federation.task.evaluate()
    reports = list(federation.run())
    losses = [r.loss for r in reports]
    assert losses[-1] < 0.5 * start
    assert losses[-1] < 0.9 * losses[config.warmup_rounds - 1]  # in the subspace as well
    assert not any(r.rejected for r in reports)


def test_after_the_switch_replies_are_quantised_codes_and_small() -> None:
    federation = make()
    reports = list(federation.run())
    server = federation.server
    assert server.config.mode == "latent"
    assert server.uplink.code_numel(spec()) <= spec().numel / SUBSPACE.ratio
    first, later = (reports[i].uplink_payload_bytes / 3 for i in (0, PLAIN.warmup_rounds))
    assert first == make_codec(PLAIN.first).nbytes(spec())
    assert (
        later
        == server.uplink.nbytes()
        == server.uplink.packer.nbytes(server.uplink.code_numel(spec()))
    )


def test_the_subspace_is_fitted_on_what_was_received_and_nothing_else() -> None:
    federation = make()
    for _ in range(PLAIN.warmup_rounds):
        federation.step()
    decoder = make_codec(PLAIN.first).bind(spec()).decoder
    moments = SignalMoments(spec(), SUBSPACE)
    replies = [Reply.from_bytes(blob) for blob in messages(federation)[0]]
    for number in range(PLAIN.warmup_rounds):
        moments.add_round([decoder.decode(r.payload) for r in replies if r.round == number])
    assert equal(federation.server.uplink.weights, fit_subspace(moments, SUBSPACE).weights)


# -- in step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_replicas_are_equal_to_the_bit_whenever_a_client_comes(config: AutoConfig) -> None:
    world = World(config)
    for number in range(ROUNDS):
        coming = [0, 1]
        coming += [2] * (number % 4 == 3)  # seen now and then, across switches
        coming += [3] * (number in (0, ROUNDS - 1))  # before all switches and after them
        coming += [10 + number]  # each round one that has never been here
        for client in coming:
            world.deliver(client)
            assert_in_step(world.clients[client], world.server)
        assert world.clients[0].config.mode == ("post" if config.untrained(number) else "latent")
        for client in coming:
            world.server.receive(world.train(client))
        world.server.close_round()
    assert world.server.fits == 1 + len(config.refresh_rounds)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("version", range(ROUNDS + 1))
def test_a_client_of_any_version_arrives(config: AutoConfig, version: int) -> None:
    world = World(config).to_round(ROUNDS)
    client = world.server.client(9, version)
    assert client.version == version
    client.receive(world.server.broadcast(version))
    assert_in_step(client, world.server)
    for route in (world.server.broadcast(0), world.server.broadcast_whole()):
        new = AutoClient(8, Toy().initial, config)
        new.receive(route)
        assert_in_step(new, world.server)


def test_a_catch_up_takes_the_shorter_route() -> None:
    world = World(REFRESHED).to_round(ROUNDS)
    server = world.server
    # Codecs that were replaced meanwhile are longer than this small state.
    assert kinds(server.broadcast(0))[0] == CODEC
    (kind, coded), *_ = parts(server.broadcast(0))
    assert (kind, bool(Switch.from_bytes(coded).state)) == (CODEC, True)
    assert server.broadcast(0) == server.broadcast_whole()
    last = server.history.phases[-1].first
    assert CODEC not in kinds(server.broadcast(last))
    before = parts(server.broadcast(last - 1))
    assert [kind for kind, _ in before][:2] == [INCREMENT, CODEC]
    assert not Switch.from_bytes(before[1][1]).state
    world.to_round(60)
    assert kinds(server.broadcast(last)) == [SNAPSHOT]
    assert len(server.broadcast(0)) <= len(server.broadcast_whole())


def test_a_long_phase_that_is_over_is_caught_up_by_its_snapshot() -> None:
    config = AutoConfig(warmup_rounds=2, subspace=SUBSPACE, refresh_rounds=(40,))
    world = World(config).to_round(40)
    blob = world.server.broadcast(2)
    assert kinds(blob) == [SNAPSHOT, CODEC]
    assert len(parts(blob)[0][1]) < sum(map(len, world.server.history.phases[1].increments))
    client = world.server.client(1, 2)
    client.receive(blob)
    assert_in_step(client, world.server)


def test_a_replica_that_was_refused_is_put_right_by_the_whole_state() -> None:
    world = World(REFRESHED).to_round(5)
    client = world.server.client(7, 4)
    client.replica.initial["bias"][0] += 1e-7  # as if its machine rounded differently
    with pytest.raises(CodecMismatchError, match="state of digest"):
        client.receive(world.server.broadcast(client.version))
    assert client.version == 4
    client.receive(world.server.broadcast_whole())
    assert_in_step(client, world.server)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_states_survive_switches(dtype: torch.dtype) -> None:
    federation = make(REFRESHED, task=Toy(dtype=dtype))
    reports = list(federation.run())
    assert reports[-1].loss < reports[0].loss
    for client in federation.clients.values():
        client.receive(federation.server.broadcast(client.version))
        assert_in_step(client, federation.server)


# -- bytes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_reported_bytes_are_the_lengths_of_real_messages(config: AutoConfig) -> None:
    federation = make(config)
    reports = list(federation.run())
    up, down = messages(federation)
    assert sum(r.uplink_bytes for r in reports) == sum(map(len, up))
    assert sum(r.downlink_bytes for r in reports) == sum(map(len, down))
    assert len(up) == len(down) == 3 * ROUNDS
    below = [
        len(part) if kind == CODEC else len(Payload.from_bytes(part).body)
        for blob in down
        for kind, part in parts(blob)
    ]
    assert sum(r.downlink_payload_bytes for r in reports) == sum(below)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_each_codec_reaches_each_client_once(config: AutoConfig) -> None:
    world = World(config)
    for number in range(ROUNDS):
        world.round([0, 1, 2 + number % 4])
    phases = [phase.switch for phase in world.server.history.phases if phase.switch is not None]
    assert len(phases) == 1 + 2 * len(config.refresh_rounds)
    came = [
        Switch.from_bytes(part).first
        for blob in world.received[0]
        for kind, part in parts(blob)
        if kind == CODEC
    ]
    assert came == [switch.first for switch in phases]
    for blobs in world.received.values():
        firsts = [
            Switch.from_bytes(part).first
            for blob in blobs
            for kind, part in parts(blob)
            if kind == CODEC
        ]
        assert len(set(firsts)) == len(firsts)
    # The round of the switch, by hand: envelope, the increment, and the codec with its weights.
    switch, weights = phases[0], world.server.uplink
    blob = world.received[0][PLAIN.warmup_rounds]
    increment = world.server.history.phases[0].increments[-1]
    coded = [(INCREMENT, increment), (CODEC, switch.to_bytes())]
    assert len(blob) == 3 + 1 + 8 + part_nbytes(coded) + 4
    if config is PLAIN:
        assert weights.weight_nbytes < len(switch.weights) < weights.weight_nbytes + 200


def test_going_back_to_the_first_codec_costs_no_weights() -> None:
    world = World(REFRESHED).to_round(5)
    switch = world.server.history.phases[-1].switch
    assert switch is not None
    assert (switch.mode, switch.weights, switch.state) == ("post", b"", b"")
    assert len(switch.to_bytes()) < 200


def test_the_bytes_of_a_codec_are_those_of_wire_md() -> None:
    world = World().to_round(3)
    server = world.server
    blob = next(part for kind, part in parts(server.broadcast(1)) if kind == CODEC)
    first, base, up, down, *lengths = struct.unpack_from("<I8s8s8sIQQ", blob)
    assert (first, base, up, down) == (
        2,
        server.uplink.base,
        server.uplink.digest,
        server.downlink.digest,
    )
    assert 48 + sum(lengths) == len(blob)
    settings = json.loads(blob[48 : 48 + lengths[0]])
    assert settings == {
        "mode": "latent",
        "uplink": server.uplink.config.to_dict(),
        "downlink": server.downlink.config.to_dict(),
    }
    payload = Payload.from_bytes(blob[48 + lengths[0] : 48 + lengths[0] + lengths[1]])
    weights = make_codec("fp32").decoder.decode(payload)
    # A parameter's name is said by its position.
    names = [t.name for t in spec()]
    long = {n.rsplit("#")[0] + names[int(n.rsplit("#")[1])]: t for n, t in weights.items()}
    assert equal(long, server.uplink.weights)
    assert max(map(len, weights)) < min(map(len, names)) + 12
    assert lengths[2] == 0


# -- damage --------------------------------------------------------------------------------------


def sealed(number: int, *given_parts: tuple[int, bytes]) -> bytes:
    return Broadcast(number, given_parts, WORLD.server.replica.lineage).to_bytes()


WORLD = World().to_round(2)
GOOD = WORLD.server.broadcast(1)
(_, STEP), (_, CODED) = parts(GOOD)
SWITCH = Switch.from_bytes(CODED)
WEIGHTS: dict[str, Tensor] = dict(WORLD.server.uplink.weights)


def behind() -> AutoClient:
    """A client at the last round before the switch."""
    return WORLD.server.client(5, 1)


def at(field: int, value: bytes) -> bytes:
    """The codec with other bytes at a place of its head."""
    return CODED[:field] + value + CODED[field + len(value) :]


def with_settings(**changes: Any) -> bytes:
    return remade(json.dumps({**SWITCH.settings, **changes}).encode())


def remade(settings: bytes, weights: bytes = SWITCH.weights, state: bytes = b"") -> bytes:
    lengths = struct.pack("<IQQ", len(settings), len(weights), len(state))
    return CODED[:28] + lengths + settings + weights + state


def with_weights(weights: dict[str, Tensor]) -> bytes:
    payload = make_codec("fp32").encoder.encode(weights)
    return remade(json.dumps(SWITCH.settings).encode(), payload.to_bytes())


def of(codec: Codec, state: dict[str, Tensor]) -> bytes:
    """An honest codec part for another codec or state."""
    return Switch.to(codec, codec, "latent", 2, state).to_bytes()


def not_a_number() -> dict[str, Tensor]:
    weights = {n: t.clone() for n, t in WEIGHTS.items()}
    next(iter(weights.values()))[0, 0] = torch.nan
    return weights


def nested(depth: int) -> dict[str, Any]:
    codec: dict[str, Any] = {"kind": "identity"}
    for _ in range(depth):
        codec = {"kind": "chain", "outer": codec, "inner": {"kind": "identity"}}
    return codec


STATE = WORLD.server.replica.initial
BAD_CODECS: dict[str, tuple[bytes, type[WireError]]] = {
    "nothing": (b"", TruncatedError),
    "cut head": (CODED[:47], TruncatedError),
    "cut weights": (CODED[:-1], TruncatedError),
    "trailing": (CODED + b"!", TrailingBytesError),
    "huge settings": (at(28, struct.pack("<I", MAX_SETTINGS_BYTES + 1)), LimitError),
    "huge weights": (at(32, struct.pack("<Q", 2**64 - 1)), TruncatedError),
    "huge state": (at(40, struct.pack("<Q", 2**63)), TruncatedError),
    "base": (at(4, b"another!"), CodecMismatchError),
    "uplink digest": (at(12, b"another!"), CodecMismatchError),
    "downlink digest": (at(20, b"another!"), CodecMismatchError),
    "round": (at(0, struct.pack("<I", 9)), CodecMismatchError),
    "flipped weight": (CODED[:-9] + bytes([CODED[-9] ^ 1]) + CODED[-8:], ChecksumError),
    "not JSON": (remade(b"{"), MalformedBodyError),
    "deep JSON": (remade(b"[" * 60_000), MalformedBodyError),
    "not UTF-8": (remade(b"\xff\xfe"), MalformedBodyError),
    "a list": (remade(b"[]"), MalformedBodyError),
    "key twice": (remade(b'{"mode":"post","mode":"post"}'), MalformedBodyError),
    "unknown key": (with_settings(more=1), MalformedBodyError),
    "mode": (with_settings(mode="both"), MalformedBodyError),
    "no codec": (with_settings(uplink=None), MalformedBodyError),
    "kind": (with_settings(uplink={"kind": "pickle"}), MalformedBodyError),
    "kind of a costly codec": (
        with_settings(uplink=AutoencoderConfig().to_dict()),
        MalformedBodyError,
    ),
    "stages": (with_settings(downlink=nested(4)), MalformedBodyError),
    "deep stages": (with_settings(downlink=nested(400)), MalformedBodyError),
    "setting": (with_settings(uplink={"kind": "blockquant", "bits": "2"}), MalformedBodyError),
    "infinite setting": (
        remade(json.dumps(SWITCH.settings).replace('"ratio": 2', '"ratio": 1e999').encode()),
        MalformedBodyError,
    ),
    "other setting": (
        remade(json.dumps(SWITCH.settings).replace('"ratio": 2', '"ratio": 3').encode()),
        CodecMismatchError,
    ),
    "a codec without weights": (with_settings(uplink={"kind": "blockquant"}), MalformedBodyError),
    "NaN weight": (with_weights(not_a_number()), MalformedBodyError),
    "shape of a weight": (
        with_weights({n: t[:-1] for n, t in WEIGHTS.items()}),
        MalformedBodyError,
    ),
    "unknown weight": (with_weights({**WEIGHTS, "shared.x": torch.zeros(2)}), MalformedBodyError),
    "weight of no parameter": (
        with_weights({f"shared.left.#{i + 3}": t for i, t in enumerate(WEIGHTS.values())}),
        MalformedBodyError,
    ),
    "same weight by two names": (
        with_weights({**WEIGHTS, "shared.left.#0": WEIGHTS[next(iter(WEIGHTS))]}),
        WireError,
    ),
    "no weights": (remade(json.dumps(SWITCH.settings).encode(), b""), CodecMismatchError),
    "other weights": (with_weights({n: t + 1 for n, t in WEIGHTS.items()}), CodecMismatchError),
    "weights without a table": (
        remade(json.dumps(SWITCH.settings).encode(), STEP),
        CodecMismatchError,
    ),
    "state of other tensors": (
        SWITCH.to_bytes({"bias": torch.zeros(6)}),
        CodecMismatchError,
    ),
    "another state": (SWITCH.to_bytes(Toy().initial), CodecMismatchError),
    "NaN state": (
        SWITCH.to_bytes({n: t + torch.nan for n, t in STATE.items()}),
        MalformedBodyError,
    ),
    "elsewhere": (of(subspace(), Toy().initial), CodecMismatchError),
}


def refused(client: AutoClient, blob: bytes, error: type[Exception]) -> None:
    before = client.version, client.replica, client.replica.position, client.codec, client.config
    kept = client.replica.position.clone()
    with pytest.raises(error):
        client.receive(blob)
    after = client.version, client.replica, client.replica.position, client.codec, client.config
    assert all(a is b for a, b in zip(before[1:], after[1:], strict=True))
    assert (before[0], True) == (after[0], torch.equal(kept, client.replica.position))


@pytest.mark.parametrize("case", BAD_CODECS)
def test_a_damaged_codec_is_named_and_changes_nothing(case: str) -> None:
    coded, error = BAD_CODECS[case]
    client = behind()
    refused(client, sealed(2, (INCREMENT, STEP), (CODEC, coded)), error)
    client.receive(GOOD)
    assert_in_step(client, WORLD.server)


BAD_STREAMS: dict[str, tuple[tuple[tuple[int, bytes], ...], type[WireError]]] = {
    "codec before the increment": (((CODEC, CODED), (INCREMENT, STEP)), CodecMismatchError),
    "codec without the increment": (((CODEC, CODED),), CodecMismatchError),
    "no codec, then a later part": (((INCREMENT, STEP), (INCREMENT, STEP)), CodecMismatchError),
    "increment of the codec before": (
        ((INCREMENT, STEP), (CODEC, CODED), (INCREMENT, STEP)),
        CodecMismatchError,
    ),
    "codec as increment": (((INCREMENT, CODED),), WireError),
    "increment as codec": (((CODEC, STEP),), WireError),
    "kind 5": (((INCREMENT, STEP), (5, CODED)), LimitError),
}


@pytest.mark.parametrize("case", BAD_STREAMS)
def test_parts_in_a_wrong_order_change_nothing(case: str) -> None:
    given_parts, error = BAD_STREAMS[case]
    refused(behind(), sealed(2, *given_parts), error)


def test_a_torn_or_flipped_message_changes_nothing() -> None:
    for cut in range(0, len(GOOD), 7):
        refused(behind(), GOOD[:cut], WireError)
        refused(behind(), GOOD[:cut] + bytes([GOOD[cut] ^ 2]) + GOOD[cut + 1 :], WireError)


@given(st.data())
def test_altered_codecs_raise_wire_errors_only(data: st.DataObject) -> None:
    changed = bytearray(CODED)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    client = behind()
    with suppress(WireError):
        client.receive(sealed(2, (INCREMENT, STEP), (CODEC, bytes(changed))))
        assert_in_step(client, WORLD.server)


@given(st.binary(max_size=80))
def test_any_settings_raise_wire_errors_only(text: bytes) -> None:
    with suppress(WireError):
        Switch.from_bytes(remade(text)).codecs(STATE)


def test_a_federation_of_a_fixed_codec_takes_no_other() -> None:
    client = Client(0, Toy().initial, make_codec("sign"), make_codec("int2"))
    with pytest.raises(LimitError, match="got 3"):
        client.receive(WORLD.server.broadcast(0))


# -- clients that fail ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_client_that_vanishes_costs_only_its_reply(number: int) -> None:
    world, alone = World(REFRESHED).to_round(number), World(REFRESHED).to_round(number)
    world.deliver(4)
    world.train(4)  # and is never heard of again
    for one in (world, alone):
        one.to_round(ROUNDS)
    assert equal(world.server.state_dict(), alone.server.state_dict())
    world.deliver(4)  # until now
    assert_in_step(world.clients[4], world.server)


def test_a_reply_from_before_a_switch_is_refused_after_it() -> None:
    world = World(REFRESHED).to_round(1)
    world.deliver(4)
    late = world.train(4)
    world.to_round(2)
    before = world.server.state_dict()
    with pytest.raises(CodecMismatchError, match="reply to round 2, got 1"):
        world.server.receive(late)
    renumbered = replace(Reply.from_bytes(late), round=2)
    with pytest.raises(CodecMismatchError, match="expected an update of the base"):
        world.server.receive(renumbered.to_bytes())
    assert equal(world.server.state_dict(), before)
    world.to_round(4)


def test_refused_replies_are_not_fitted_on() -> None:
    one, other = World(), World()
    for _ in range(2):
        for world in (one, other):
            for client in (0, 1, 2):
                world.deliver(client)
                world.server.receive(world.train(client))
            if world is one:
                world.deliver(3)
                bad = bytearray(world.train(3))
                bad[-6] ^= 1
                with pytest.raises(ChecksumError):
                    world.server.receive(bytes(bad))
            world.server.close_round()
    assert equal(one.server.state_dict(), other.server.state_dict())
    assert one.server.fits == 1


def test_a_round_without_replies_cannot_be_closed_and_does_not_switch() -> None:
    world = World().to_round(1)
    before = world.server.state_dict()
    with pytest.raises(TrainingError):
        world.server.close_round()
    assert equal(world.server.state_dict(), before)
    world.to_round(2)
    assert world.server.fits == 1


def test_without_agreement_between_clients_the_switch_waits() -> None:
    world = World()
    for _ in range(4):
        world.round((0,))  # one client alone agrees with nobody
    assert (world.server.round, world.server.fits) == (4, 0)
    assert world.server.config.mode == "post"
    world.round((0, 1))
    assert (world.server.round, world.server.fits) == (5, 1)
    world.round((0,))
    assert_in_step(world.deliver(0), world.server)


# -- switches, seen from the server --------------------------------------------------------------


def test_a_refresh_fits_again_and_sends_another_codec() -> None:
    world = World(REFRESHED)
    modes, weights = [], []
    for number in range(ROUNDS):
        world.to_round(number)
        modes.append(world.server.config.mode)
        weights.append(world.server.uplink.weights)
    assert [m == "post" for m in modes] == [REFRESHED.untrained(r) for r in range(ROUNDS)]
    assert equal(weights[2], weights[4])
    assert weights[5] == {}
    assert not equal(weights[4], weights[6])
    assert not equal(weights[6], weights[9])


def test_decay_says_how_much_earlier_rounds_count() -> None:
    ends = {}
    for decay in (0.0, 0.5, 1.0):
        config = AutoConfig(warmup_rounds=2, subspace=SUBSPACE, refresh_rounds=(4, 5), decay=decay)
        server = World(config).to_round(6).server
        reader = make_codec(config.first).bind(spec()).decoder
        ends[decay] = server.uplink.weights
        assert server.fits == 2
    # With none, the refit has seen nothing but the two rounds of the refresh.
    config = AutoConfig(warmup_rounds=2, subspace=SUBSPACE, refresh_rounds=(4, 5), decay=0.0)
    world = World(config).to_round(4)
    moments = SignalMoments(spec(), SUBSPACE)
    for _ in range(2):
        blobs = []
        for client in (0, 1, 2):
            world.deliver(client)
            blobs.append(world.train(client))
            world.server.receive(blobs[-1])
        moments.add_round([reader.decode(Reply.from_bytes(b).payload) for b in blobs])
        world.server.close_round()
    assert equal(ends[0.0], fit_subspace(moments, SUBSPACE).weights)
    assert not equal(ends[0.0], ends[1.0])


def flat(update: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in update.values()])


def test_momentum_and_residual_are_carried_over_as_far_as_the_codec_can_say_them() -> None:
    server = World(REFRESHED).to_round(2).server
    momentum, residual = server.momentum, server.residual
    assert momentum.any()
    assert residual.any()
    back = server.uplink.from_code(momentum)
    assert torch.allclose(server.uplink.to_code(back), momentum, atol=1e-2)
    world = World(REFRESHED).to_round(5)  # back in full space, after some rounds in the subspace
    codec = world.server.history.phases[1].switch
    assert codec is not None
    assert len(world.server.momentum) == spec().numel
    assert flat(world.server.uplink.from_code(world.server.momentum)).any()


def test_replies_too_loud_to_be_squared_are_not_fitted_on() -> None:
    world, alone = World(), World()
    for one in (world, alone):
        one.to_round(1)
        for client in (0, 1, 2):
            one.deliver(client)
            one.server.receive(one.train(client))
    loud = {n: t + 1e30 for n, t in world.server.replica.state().items()}
    world.deliver(3)
    world.server.receive(world.clients[3].reply(loud, 1))
    for one in (world, alone):
        one.server.close_round()
        assert one.server.fits == 1
    assert equal(world.server.uplink.weights, alone.server.uplink.weights)


def test_sides_that_are_too_long_for_pairs_are_fitted_on_mean_updates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = World().to_round(3).server
    monkeypatch.setattr(moments, "EXACT_LIMIT", 4)
    means = World().to_round(3).server
    assert means.fits == plain.fits == 1
    assert not equal(means.uplink.weights, plain.uplink.weights)


# -- resuming ------------------------------------------------------------------------------------


def run(federation: Federation, reports: list[RoundReport], path: Path, until: int) -> None:
    while federation.finished < until:
        reports.append(federation.step())
        checkpoint.save(path, federation, reports)


@pytest.mark.parametrize("killed", range(1, ROUNDS))
def test_resuming_at_any_round_gives_the_same_bytes(killed: int, tmp_path: Path) -> None:
    whole, all_reports = make(REFRESHED), []
    run(whole, all_reports, tmp_path / "whole.safetensors", ROUNDS)
    path = tmp_path / "run.safetensors"
    run(make(REFRESHED), [], path, killed)  # and here the process ends
    again = make(REFRESHED)
    reports = checkpoint.load(path, again)
    run(again, reports, path, ROUNDS)
    assert timeless(reports) == timeless(all_reports)
    for mine, theirs in zip(messages(again), messages(whole), strict=True):
        assert mine == theirs[3 * killed :]
    assert equal(again.server.state_dict(), whole.server.state_dict())
    assert equal(again.server.replica.state(), whole.server.replica.state())


CHANGES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "no momentum": lambda s: s.pop("momentum"),
    "size": lambda s: s.update(residual=torch.zeros(3)),
    "increment": lambda s: s["increment.000001"].add_(1),
    "gap": lambda s: s.pop("increment.000001"),
    "codec": lambda s: s["codec.000002"].add_(1),
    "no codec": lambda s: s.pop("codec.000002"),
    "later codec": lambda s: s.update({"codec.000099": s["codec.000002"]}),
    "reply": lambda s: s["seen.000000.000000.000000"].add_(1),
    "name": lambda s: s.update({"seen.x": torch.zeros(3, dtype=torch.uint8)}),
    "extra": lambda s: s.update({"more.x": torch.zeros(3, dtype=torch.uint8)}),
    "dtype": lambda s: s.update({"more.x": torch.zeros(3, dtype=torch.bfloat16)}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_foreign_state_dict_changes_nothing(change: str) -> None:
    saved = {n: t.clone() for n, t in World(REFRESHED).to_round(4).server.state_dict().items()}
    other = World(REFRESHED).to_round(3)
    CHANGES[change](saved)
    before = other.server.state_dict()
    with pytest.raises((ConfigError, WireError)):
        other.server.load_state_dict(saved)
    assert equal(other.server.state_dict(), before)
    other.to_round(7)


def test_what_was_received_is_kept_only_while_a_fit_may_want_it() -> None:
    def seen(world: World) -> int:
        return sum(name.startswith("seen.") for name in world.server.state_dict())

    assert [seen(World().to_round(r)) for r in (1, 2, 3)] == [3, 0, 0]
    assert [seen(World(REFRESHED).to_round(r)) for r in (2, 6, 9)] == [6, 9, 0]


# -- settings ------------------------------------------------------------------------------------


def test_server_for_takes_names_and_codecs() -> None:
    initial = Toy().initial
    server = server_for("subspace:auto", initial, PLAIN)
    assert isinstance(server, AutoServer)
    assert isinstance(server.client(0), AutoClient)
    fixed = server_for("int8", initial)
    assert (type(fixed), type(fixed.client(0))) == (Server, Client)
    latent = ServerConfig(mode="latent")
    assert server_for(quantised(), initial, latent).config == latent
    assert server_for("sign", initial, downlink="int8").downlink.config.bits == 8
    with pytest.raises(ConfigError, match="downlink"):
        server_for("subspace:auto", initial, downlink="int8")
    with pytest.raises(ConfigError, match="'subspace:best'"):
        server_for("subspace:best", initial)
    with pytest.raises(ConfigError, match="ServerConfig"):
        server_for("subspace:auto", initial, latent)
    with pytest.raises(ConfigError, match="AutoConfig"):
        server_for("int8", initial, PLAIN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_rounds": 0}, "warmup_rounds"),
        ({"first": "sgin"}, "sgin"),
        ({"first_down": "int3"}, "int3"),
        ({"bits": 3}, "bits"),
        ({"down_bits": 0}, "bits"),
        ({"refresh_rounds": (9, 1)}, "refresh_rounds"),
        ({"decay": 1.5}, "decay"),
        ({"decay": 0.5}, "refresh_rounds"),
        ({"momentum": 1.0}, "momentum"),
        ({"lr": 0.0}, "lr"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoConfig(**options)


def test_a_subspace_that_cannot_be_fitted_is_refused_before_the_first_round() -> None:
    with pytest.raises(ConfigError, match="min_rank"):
        AutoServer(Toy().initial, AutoConfig(subspace=SubspaceConfig(1000, "tempered")))


@pytest.mark.parametrize("version", [-1, 4])
def test_a_version_that_never_was_is_refused(version: int) -> None:
    with pytest.raises(ConfigError, match=r"version of 0\.\.3"):
        World().to_round(3).server.broadcast(version)
