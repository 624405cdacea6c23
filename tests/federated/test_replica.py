"""Laws of replicas: whichever way a state is reached, it is the same to the bit."""

from contextlib import suppress

import pytest
import torch
from federated.toy import CODECS, Toy, autoencoder, equal, quantised, reply, spec
from hypothesis import given
from hypothesis import strategies as st

from gradcodec.codecs import Identity
from gradcodec.errors import CodecMismatchError, UpdateError, WireError
from gradcodec.federated.config import ServerConfig
from gradcodec.federated.envelope import INCREMENT, SNAPSHOT, VALUES, Broadcast, part_nbytes
from gradcodec.federated.replica import Replica, Space, for_state, state_digest
from gradcodec.federated.server import Server
from gradcodec.types import UpdateSpec
from gradcodec.wire import Payload

SPACES = [(codec, "latent") for codec in CODECS] + [
    (codec, what) for codec in CODECS for what in ("update", "state")
]


def make_server(codec: str = "subspace-int4", what: str = "update") -> Server:
    config = ServerConfig(mode="latent") if what == "latent" else ServerConfig(representation=what)
    return Server(Toy().initial, CODECS[codec], config=config)


def close_rounds(server: Server, count: int) -> None:
    generator = torch.Generator().manual_seed(server.round)
    for _ in range(count):
        values = {
            n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in Toy().initial.items()
        }
        server.receive(reply(server, 0, values, 4).to_bytes())
        server.close_round()


def replica_of(server: Server) -> Replica:
    return Replica(Toy().initial, server.space)


@pytest.mark.parametrize(("codec", "what"), SPACES)
def test_increments_one_by_one_give_the_servers_state(codec: str, what: str) -> None:
    server = make_server(codec, what)
    replica = replica_of(server)
    for _ in range(4):
        close_rounds(server, 1)
        replica.receive(server.broadcast(replica.version))
        assert replica.version == server.round
        assert torch.equal(replica.position, server.replica.position)
        assert equal(replica.state(), server.replica.state())
    assert not equal(replica.state(), Toy().initial)


@pytest.mark.parametrize(("codec", "what"), SPACES)
@pytest.mark.parametrize("missed", [2, 12])
def test_a_late_client_catches_up_to_the_bit(codec: str, what: str, missed: int) -> None:
    server = make_server(codec, what)
    close_rounds(server, 1)
    late = replica_of(server)
    late.receive(server.broadcast(0))
    close_rounds(server, missed)
    late.receive(server.broadcast(1))
    assert torch.equal(late.position, server.replica.position)
    assert equal(late.state(), server.replica.state())
    new = replica_of(server)
    new.receive(server.broadcast())
    assert equal(new.state(), server.replica.state())


@pytest.mark.parametrize(("codec", "what"), SPACES)
def test_a_snapshot_equals_the_increments(codec: str, what: str) -> None:
    server = make_server(codec, what)
    close_rounds(server, 3)
    blob = server.replica.snapshot().to_bytes()
    replica = replica_of(server)
    replica.receive(Broadcast(3, ((SNAPSHOT, blob),), server.replica.lineage).to_bytes())
    assert torch.equal(replica.position, server.replica.position)
    assert equal(replica.state(), server.replica.state())


def test_a_catch_up_costs_at_most_one_snapshot() -> None:
    server = make_server()
    close_rounds(server, 40)
    snapshot = len(server.replica.snapshot().to_bytes())
    around = 3 + 1 + 8 + 4  # magic and version, round, lineage; checksum
    last = part_nbytes([(INCREMENT, server.increments[-1])])
    assert len(server.broadcast(0)) == around + part_nbytes([(SNAPSHOT, bytes(snapshot))])
    assert len(server.broadcast(39)) == around + last
    assert len(server.broadcast(40)) == around
    # A code, not a model: the snapshot is half as many fp32 values as there are parameters.
    assert snapshot < 0.6 * spec().nbytes + 40


@pytest.mark.parametrize("codec", CODECS)
def test_a_new_replica_is_the_initial_state(codec: str) -> None:
    server = make_server(codec, "latent")
    replica = replica_of(server)
    assert equal(replica.state(), Toy().initial)
    replica.receive(server.broadcast())
    assert (replica.version, equal(replica.state(), Toy().initial)) == (0, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_states_keep_their_dtypes_and_digits(dtype: torch.dtype) -> None:
    initial = {n: t.to(dtype) + torch.randn(t.shape).to(dtype) for n, t in Toy().initial.items()}
    server = Server(initial, Identity())
    assert equal(server.replica.state(), initial)
    ones = {n: torch.ones_like(t) for n, t in initial.items()}
    server.receive(reply(server, 0, ones).to_bytes())
    server.close_round()
    assert equal(server.replica.state(), {n: t + 1 for n, t in initial.items()})


def bad_broadcasts() -> dict[str, bytes]:
    server = make_server()
    close_rounds(server, 3)
    good, whole = server.increments[1], server.replica.snapshot().to_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    other = make_server("int8")
    close_rounds(other, 2)
    elsewhere = Server({n: t + 1 for n, t in Toy().initial.items()}, quantised())
    elsewhere.receive(reply(elsewhere, 0, Toy().initial).to_bytes())
    of_another_base = elsewhere.close_round()
    now, before = server.replica.lineage, Payload.from_bytes(server.increments[2]).base
    assert before is not None

    def message(number: int, *parts: tuple[int, bytes], lineage: bytes = before) -> bytes:
        return Broadcast(number, parts, lineage).to_bytes()

    return {
        "flipped": message(2, (INCREMENT, bytes(flipped))),
        "second flipped": message(3, (INCREMENT, good), (INCREMENT, bytes(flipped)), lineage=now),
        "wrong round": message(3, (INCREMENT, good)),
        "round without parts": message(2),
        "snapshot as increment": message(2, (INCREMENT, whole)),
        "increment as snapshot": message(2, (SNAPSHOT, good)),
        "other codec": message(2, (INCREMENT, other.increments[1])),
        "other base": message(2, (INCREMENT, of_another_base)),
        "cut": message(2, (INCREMENT, good))[:-3],
        "no payload": message(2, (INCREMENT, b"")),
        "another end": message(2, (INCREMENT, good), lineage=now),
        "values of no tensor": message(2, (INCREMENT, good), (VALUES, whole)),
    }


@pytest.mark.parametrize("case", bad_broadcasts())
def test_on_any_error_nothing_changes(case: str) -> None:
    server = make_server()
    close_rounds(server, 1)
    replica = replica_of(server)
    replica.receive(server.broadcast(0))
    before = replica.version, replica.position.clone()
    with pytest.raises(WireError):
        replica.receive(bad_broadcasts()[case])
    assert replica.version == before[0]
    assert torch.equal(replica.position, before[1])


_BLOB = Broadcast(2, ((INCREMENT, b"GC" * 9),), bytes(8)).to_bytes()


@given(st.one_of(st.binary(max_size=60), st.binary(max_size=20).map(lambda b: _BLOB + b)))
def test_any_bytes_raise_wire_errors_only(blob: bytes) -> None:
    server = make_server()
    replica = replica_of(server)
    with suppress(WireError):
        replica.receive(blob)
    assert not replica.position.any()


def test_digests_see_names_values_and_shapes() -> None:
    state = Toy().initial
    changed = {n: t.clone() for n, t in state.items()}
    changed["bias"][0] += 1
    variants = [
        state,
        changed,
        {n.upper(): t for n, t in state.items()},
        {n: t.T for n, t in state.items() if t.ndim == 2},
        {n: t.double() for n, t in state.items()},
    ]
    assert len({state_digest(v) for v in variants}) == len(variants)
    assert state_digest(Toy().initial) == state_digest(state)


def test_a_codec_of_other_tensors_is_refused() -> None:
    with pytest.raises(UpdateError):
        for_state(autoencoder(), {"w": torch.zeros(3)})


def test_a_payload_of_another_base_is_refused() -> None:
    here = for_state(Identity(), Toy().initial)
    there = for_state(Identity(), {n: t + 1 for n, t in Toy().initial.items()})
    with pytest.raises(CodecMismatchError, match="base"):
        here.decoder.decode(there.encoder.encode(Toy().initial))


def test_nonlinear_replicas_keep_positions_as_values() -> None:
    space = Space(for_state(autoencoder(), Toy().initial), latent=True)
    assert not space.in_code
    assert space.numel == UpdateSpec.of(Toy().initial).numel


def test_replicas_are_on_the_host_wherever_the_codec_was_moved_to() -> None:
    initial = Toy().initial
    plain, moved = (for_state(c, initial) for c in (Identity(), Identity().to("meta")))
    assert moved.pipeline.device == torch.device("cpu")
    assert moved.digest == plain.digest
