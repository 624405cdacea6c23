"""Laws of the peers: messages are all that crosses, errors and bytes are what is promised."""

import math
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.federated.case import summed
from benchmarks.federated.methods import Method, State
from benchmarks.peers import optional
from benchmarks.peers.federated import (
    EDEN,
    FLASC,
    Cast,
    EcoLoRA,
    FedKSeed,
    Ferret,
    FFALoRA,
    Peer,
    SignEF,
    SparseLoCo,
    random_subspace,
)
from benchmarks.peers.federated.downlink import Increments
from benchmarks.peers.federated.envelope import BROADCAST_OVERHEAD, REPLY_OVERHEAD, Broadcast, Reply
from benchmarks.peers.rice import decode_positions, encode_positions
from gradcodec import layout
from gradcodec.errors import (
    ChecksumError,
    CodecMismatchError,
    ConfigError,
    EmptyClientError,
    MalformedBodyError,
    NonFiniteError,
    TrainingError,
    WireError,
)

CLIENTS, ROUNDS = 3, 3


def initial() -> State:
    """Two layers of LoRA factors; 1,600 values, no power of two."""
    g = torch.Generator().manual_seed(1)
    out = {}
    for layer in range(2):
        out[f"l{layer}.lora_A.weight"] = torch.randn(4, 100, generator=g) / 10
        out[f"l{layer}.lora_B.weight"] = torch.zeros(100, 4)
    return out


SIZE = sum(t.numel() for t in initial().values())
Maker = Callable[[], Any]


def eden(**options: Any) -> EDEN:
    pytest.importorskip("openfl")
    return EDEN(initial(), **options)


def cast(kind: str, **options: Any) -> Cast:
    if kind != "float16":
        pytest.importorskip("bitsandbytes")
    return Cast(initial(), kind=kind, **options)


def loco() -> SparseLoCo:
    return SparseLoCo(initial(), k=16, chunk=256)


#: Peers by name: maker, bounds of the relative error on a normal update, bytes of a body.
PEERS: dict[str, tuple[Callable[[], Peer], tuple[float, float], tuple[int, int]]] = {
    "fp32": (lambda: Peer(initial()), (0, 0), (6400, 6400)),
    # Lloyd-Max errors of a normal value are 0.60, 0.34 and 0.097; unbiased scales make them larger.
    "eden-1": (lambda: eden(bits=1), (0.65, 0.85), (2 + 12 + 200, 2 + 12 + 200)),
    "eden-2": (lambda: eden(bits=2), (0.3, 0.42), (2 + 12 + 400, 2 + 12 + 400)),
    "eden-4": (lambda: eden(bits=4), (0.08, 0.12), (2 + 12 + 800, 2 + 12 + 800)),
    "eden-2-tensors": (lambda: eden(bits=2, per_tensor=True), (0.3, 0.42), (2 + 48 + 400, 450)),
    "eden-2-down": (lambda: eden(bits=2, downlink="eden"), (0.3, 0.42), (414, 414)),
    # The largest eighth of normal values holds a bit more than half of the energy.
    "flasc": (lambda: FLASC(initial()), (0.6, 0.75), (200 * 4 + 100, 200 * 4 + 125)),
    "flasc-weights": (
        lambda: FLASC(initial(), relative=False, dtype=torch.float16),
        (0.6, 0.75),
        (200 * 2 + 100, 200 * 2 + 125),
    ),
    # A fifth of the values is sent, so four fifths of the energy are left.
    "ecolora": (lambda: EcoLoRA(initial()), (0.88, 0.91), (4 + 304 * 2 + 8, 4 + 304 * 2 + 20)),
    "ecolora-mixed": (lambda: EcoLoRA(initial(), mixing=1.0), (0.88, 0.91), (620, 632)),
    "sparseloco": (loco, (0.7, 0.85), (7 * 4 + 28 + 112, 7 * 4 + 28 + 112)),
    "sign": (lambda: SignEF(initial()), (0.55, 0.65), (7 * 2 + 200, 7 * 2 + 200)),
    "sign-down": (lambda: SignEF(initial(), downlink="sign"), (0.55, 0.65), (214, 214)),
    "ffa": (lambda: FFALoRA(initial()), (0, 0), (3200, 3200)),
    # Unbiased from 64 Gaussian directions for 400 values: sqrt(401 / 64) = 2.5.
    "ferret": (
        lambda: Ferret(initial(), kept=64, block=400),
        (2.2, 2.8),
        (4 + 4 * 64 * 4, 4 + 4 * 64 * 4),
    ),
    # The update is of scalars, which are exact; 32 places of 256 have an entropy of 17 bytes.
    "fedkseed": (
        lambda: FedKSeed(initial(), seeds=256),
        (0, 0),
        (4 + 32 * 4 + 15, 4 + 32 * 4 + 21),
    ),
    "float16": (lambda: cast("float16"), (1e-5, 5e-4), (3200, 3200)),
    "blockwise8": (lambda: cast("blockwise8"), (1e-3, 0.02), (1600 + 4 * 4, 1600 + 4 * 4)),
    "normfloat4": (lambda: cast("normfloat4"), (0.07, 0.12), (800 + 28 * 4, 800 + 28 * 4)),
    "float4": (lambda: cast("float4"), (0.1, 0.17), (912, 912)),
    "normfloat4-weights": (lambda: cast("normfloat4", relative=False), (0.07, 0.12), (912, 912)),
}
EVERY = pytest.mark.parametrize("name", PEERS)


def maker(name: str) -> Callable[[], Peer]:
    return PEERS[name][0]


def drawn(seed: int, size: int = SIZE) -> Tensor:
    """A made-up update."""
    return 0.1 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def trained(method: Method, client: int, round: int, state: State) -> tuple[Any, State]:
    """An optimiser, and the state moved by a made-up update where that optimiser may."""
    parameters = {n: nn.Parameter(t.clone()) for n, t in state.items()}
    optimizer = method.optimizer(client, parameters, torch.optim.SGD, lr=1.0)
    noise = drawn(100 * round + client).split([t.numel() for t in state.values()])
    for p, part in zip(parameters.values(), noise, strict=True):
        p.grad = part.reshape(p.shape)
    optimizer.step()
    return optimizer, {n: p.detach() for n, p in parameters.items()}


def examples(client: int) -> int:
    return 5 + 7 * client


def sampled(round: int) -> list[int]:
    """Client 1 sits out a round, and so has to be caught up."""
    return [0, 2] if round == 1 else [0, 1, 2]


def federate(method: Method) -> tuple[list[int], list[int]]:
    """A toy federation; the bytes of every broadcast and every reply."""
    down, up = [], []
    for t in range(ROUNDS):
        for c in sampled(t):
            blob, state = method.deliver(c)
            reply = method.reply(c, *trained(method, c, t, state), examples(c))
            method.receive(reply)
            down.append(len(blob))
            up.append(len(reply))
        method.close_round()
    return down, up


def equal(a: State, b: State) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in a)


def vector(state: State) -> Tensor:
    return torch.cat([t.reshape(-1) for t in state.values()])


def resealed(blob: bytes, body: bytes) -> bytes:
    """A reply with another body and a right checksum."""
    reply = Reply.from_bytes(blob)
    return Reply(reply.client, reply.round, reply.examples, body).to_bytes()


@EVERY
def test_only_bytes_cross_between_server_and_clients(name: str) -> None:
    server, side, one = maker(name)(), maker(name)(), maker(name)()
    for t in range(ROUNDS):
        for c in sampled(t):
            state = side.arrive(c, server.broadcast(c))
            server.receive(side.reply(c, *trained(side, c, t, state), examples(c)))
        server.close_round()
    federate(one)
    assert equal(server.state(), one.state())
    assert not equal(server.state(), initial())
    assert side.round == 0, "the clients' instance was no server"


def test_a_sum_moves_by_what_all_clients_changed() -> None:
    world: Any = SimpleNamespace(initial=initial())
    method = summed(world)
    for c in range(CLIENTS):
        _, state = method.deliver(c)
        method.receive(method.reply(c, *trained(method, c, 0, state), examples(c)))
    method.close_round()
    moved = vector(method.state()) - vector(initial())
    assert torch.allclose(moved, -sum(drawn(c) for c in range(CLIENTS)), atol=1e-6)


@EVERY
def test_every_message_has_the_promised_bytes(name: str) -> None:
    least, most = PEERS[name][2]
    peer = maker(name)()
    down, up = federate(peer)
    if name.startswith("ecolora"):  # its shares fall from round to round
        assert least <= up[0] - REPLY_OVERHEAD <= most
        assert up[0] > up[-1] > up[0] / 2
    else:
        assert all(least <= u - REPLY_OVERHEAD <= most for u in up)
    assert down[:CLIENTS] == [BROADCAST_OVERHEAD] * CLIENTS, "nothing to send before a round"
    size = peer.start.numel()
    if name in ("sign-down", "eden-2-down"):
        bodies = [d - BROADCAST_OVERHEAD for d in down[CLIENTS:]]
        assert bodies == [least, least, least, 2 * least + 4, least], "client 1 missed a round"
    elif name.startswith(("flasc", "float", "block", "norm")):
        assert all(least <= d - BROADCAST_OVERHEAD <= most for d in down[CLIENTS:])
    elif name.startswith(("ecolora", "fedkseed")):
        assert all(size < d < 4 * size for d in down[CLIENTS:])
    else:
        assert down[CLIENTS:] == [4 * size + BROADCAST_OVERHEAD] * (len(down) - CLIENTS)


@EVERY
def test_the_error_of_a_message_is_within_its_bounds_on_both_sides(name: str) -> None:
    peer = maker(name)()
    low, high = PEERS[name][1]
    update = drawn(3, peer.start.numel())
    got = peer.read(Reply(1, 0, 1, peer.encode(1, update)))
    error = float((got - update).norm() / update.norm())
    assert low <= error <= high


@EVERY
def test_the_step_is_the_mean_weighted_by_examples(name: str) -> None:
    peer = maker(name)()
    messages = []
    for c in range(CLIENTS):
        _, state = peer.deliver(c)
        messages.append(peer.reply(c, *trained(peer, c, 0, state), examples(c)))
    # Arrival order must not matter.
    for blob in reversed(messages):
        peer.receive(blob)
    replies = [Reply.from_bytes(m) for m in messages]
    updates = [peer.read(r).double() for r in replies]
    total = sum(r.examples for r in replies)
    mean = sum(r.examples / total * u for r, u in zip(replies, updates, strict=True))
    if name.startswith("ecolora"):  # three clients, three segments, each with one sender
        mean = sum(updates)
    before = peer.downlink.vector.clone()
    peer.close_round()
    sent = peer.downlink.vector - before
    if isinstance(peer.downlink, Increments) and peer.downlink.feedback:
        sent = sent + peer.downlink.residual
    if name == "eden-2-down":  # the step itself is coded, and nothing remembers what was lost
        assert 0.2 < float((sent - mean).norm() / mean.norm()) < 0.5
    else:
        torch.testing.assert_close(sent.double(), mean, rtol=1e-5, atol=1e-6)


@EVERY
def test_damaged_replies_raise_and_change_nothing(name: str) -> None:
    peer = maker(name)()
    _, state = peer.deliver(0)
    blob = peer.reply(0, *trained(peer, 0, 0, state), 4)
    body = Reply.from_bytes(blob).body
    for bad in (b"", blob[:11], blob[:-1], blob + b"\0", blob[:20] + b"\xff\xfe" + blob[22:]):
        with pytest.raises(WireError):
            peer.receive(bad)
    for wrong in (b"", body[:-1], body[: len(body) // 2], body + b"\0"):
        with pytest.raises(WireError):
            peer.receive(resealed(blob, wrong))
    peer.receive(blob)
    with pytest.raises(CodecMismatchError, match="second reply"):
        peer.receive(blob)
    peer.close_round()
    with pytest.raises(CodecMismatchError, match="expected a reply to round 1, got 0"):
        peer.receive(blob)


@EVERY
def test_damaged_broadcasts_raise_and_change_nothing(name: str) -> None:
    server, side = maker(name)(), maker(name)()
    state = side.arrive(0, server.broadcast(0))
    server.receive(side.reply(0, *trained(side, 0, 0, state), 1))
    server.close_round()
    blob = server.broadcast(0)
    message = Broadcast.from_bytes(blob)
    (part,) = message.parts
    for wrong in (part[:-1], part + b"\0", b""):
        with pytest.raises(WireError):
            side.arrive(0, Broadcast(1, (wrong,), message.whole).to_bytes())
    for bad in (blob[:-1], blob[:8] + b"?" + blob[9:], Broadcast(1).to_bytes()):
        with pytest.raises(WireError):
            side.arrive(0, bad)
    assert side.memory(0).version == 0
    side.arrive(0, blob)
    assert side.memory(0).version == 1


@EVERY
def test_states_may_be_trained_in_place(name: str) -> None:
    one, other = maker(name)(), maker(name)()
    for peer in (one, other):
        state = peer.deliver(0)[1]
        optimizer, end = trained(peer, 0, 0, state)
        if peer is one:
            for t in (*state.values(), *peer.state().values()):
                t.fill_(7.0)
        peer.receive(peer.reply(0, optimizer, end, 1))
        peer.close_round()
    assert equal(one.state(), other.state())


@EVERY
def test_nothing_but_finite_updates_of_real_examples_is_sent(name: str) -> None:
    peer = maker(name)()
    _, state = peer.deliver(0)
    optimizer, end = trained(peer, 0, 0, state)
    with pytest.raises(EmptyClientError):
        peer.reply(0, optimizer, end, 0)
    end["l1.lora_B.weight"][0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        peer.reply(0, optimizer, end, 1)
    with pytest.raises(TrainingError):
        peer.close_round()


# Error feedback: what was sent and what is still owed make up what was wanted.


@pytest.mark.parametrize(("name", "decay"), [("sparseloco", 0.95), ("sign", 1.0)])
def test_error_feedback_loses_nothing(name: str, decay: float) -> None:
    peer = maker(name)()
    owed = torch.zeros(SIZE).double()
    for t in range(3):
        update = drawn(t)
        got = peer.decode(peer.encode(0, update)).double()
        wanted = update.double() + decay * owed
        owed = peer.memory(0).residual.double()
        torch.testing.assert_close(got + owed, wanted, rtol=0, atol=1e-6)
        assert owed.norm() > 0.1 * wanted.norm()


def test_without_feedback_nothing_is_owed() -> None:
    peer = SignEF(initial(), feedback=False, downlink="sign")
    federate(peer)
    assert not peer.memory(0).residual.any()
    assert isinstance(peer.downlink, Increments)
    assert not peer.downlink.residual.any()


def test_the_servers_feedback_loses_nothing() -> None:
    peer = SignEF(initial(), downlink="sign")
    total = torch.zeros(SIZE).double()
    for t in range(4):
        state = peer.deliver(0)[1]
        blob = peer.reply(0, *trained(peer, 0, t, state), 1)
        peer.receive(blob)
        total += peer.decode(Reply.from_bytes(blob).body).double()
        peer.close_round()
    down = peer.downlink
    assert isinstance(down, Increments)
    moved = (down.vector - down.start).double()
    torch.testing.assert_close(moved + down.residual, total, rtol=0, atol=1e-5)


def test_a_client_long_gone_gets_the_cheaper_of_increments_and_state() -> None:
    peer = SignEF(initial(), downlink="sign")
    sizes = []
    for t in range(40):
        state = peer.deliver(0)[1]
        peer.receive(peer.reply(0, *trained(peer, 0, t, state), 1))
        peer.close_round()
        fresh = SignEF(initial(), downlink="sign")
        blob = peer.downlink.broadcast(0)
        assert equal(fresh.arrive(9, blob), peer.state())
        sizes.append(len(blob))
    assert sizes[:2] == [214 + BROADCAST_OVERHEAD, 2 * 214 + 4 + BROADCAST_OVERHEAD]
    assert max(sizes) == sizes[-1] == 4 * SIZE + BROADCAST_OVERHEAD


# What is particular to one peer.


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_eden_is_unbiased_over_rotations(bits: int) -> None:
    peer = eden(bits=bits)
    update = drawn(5)
    mean = torch.stack([peer.decode(peer.encode(c, update)) for c in range(40)]).mean(0)
    one = float((peer.decode(peer.encode(0, update)) - update).norm())
    assert float((mean - update).norm()) < 0.3 * one, "independent errors shrink as 1/sqrt(40)"


@pytest.mark.parametrize("per_tensor", [False, True])
def test_eden_sends_silent_parts_exactly(per_tensor: bool) -> None:
    peer = eden(per_tensor=per_tensor)
    update = drawn(5)
    update[:1024] = 0  # the first slice of the whole vector, the first tensors
    got = peer.decode(peer.encode(0, update))
    silent = 800 if per_tensor else 1024
    assert not got[:silent].any()
    assert got[1024:].any()
    assert not peer.decode(peer.encode(0, torch.zeros(SIZE))).any()


def test_eden_sends_small_tensors_raw_and_refuses_bad_settings() -> None:
    pytest.importorskip("openfl")
    small = {"a": torch.zeros(10), "b": torch.zeros(300)}
    peer = EDEN(small, per_tensor=True)
    update = drawn(1, 310)
    got = peer.decode(peer.encode(0, update))
    assert torch.equal(got[:10], update[:10])
    assert not torch.equal(got[10:], update[10:])
    for bad in ({"bits": 9}, {"downlink": "nf4"}, {"threshold": 3}):
        with pytest.raises(ConfigError):
            EDEN(small, **bad)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"gradcodec\[bench\].*openfl==1.9"):
        EDEN(initial())
    with pytest.raises(ImportError, match=r"gradcodec\[bench\].*bitsandbytes"):
        Cast(initial())
    Cast(initial(), kind="float16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_flasc_keeps_exactly_k_values_both_ways(dtype: torch.dtype) -> None:
    peer = FLASC(initial(), density_up=0.1, density_down=0.25, dtype=dtype)
    for t in range(2):
        for c in range(CLIENTS):
            state = peer.deliver(c)[1]
            moved = vector(state) - vector(initial())
            assert int((moved != 0).sum()) == (400 if t else 0)
            blob = peer.reply(c, *trained(peer, c, t, state), 1)
            update = peer.read(Reply.from_bytes(blob))
            assert int((update != 0).sum()) == 160
            peer.receive(blob)
        peer.close_round()


def test_flasc_of_weights_masks_the_start_too() -> None:
    peer = FLASC(initial(), relative=False, evaluate="dense")
    state = peer.deliver(0)[1]
    assert int((vector(state) != 0).sum()) == 200
    assert equal(peer.state(), initial()), "the server's own state is dense"
    assert FLASC(initial()).k_up == 200


@pytest.mark.parametrize("segments", [1, 5, 7])
def test_ecolora_covers_all_segments_in_as_many_rounds(segments: int) -> None:
    peer = EcoLoRA(initial(), segments=segments)
    for client in range(CLIENTS):
        slices = [peer.segment(client, t) for t in range(3, 3 + segments)]
        covered = np.concatenate([np.arange(SIZE)[s] for s in slices])
        assert np.array_equal(np.sort(covered), np.arange(SIZE))


def test_ecolora_averages_a_segment_over_its_senders_and_leaves_the_others() -> None:
    peer = EcoLoRA(initial(), segments=4, k_max=1.0)
    # Clients 0 and 4 share a segment, client 1 has the next one; the last two have no sender.
    updates = {c: torch.full((SIZE,), 1.0 + c) for c in (0, 1, 4)}
    for c, update in updates.items():
        state = peer.deliver(c)[1]
        end = layout.unflatten(layout.flatten(state, peer.spec) + update, peer.spec)
        optimizer = peer.optimizer(c, {}, _Null)
        peer.receive(peer.reply(c, optimizer, end, 1 + c))
    peer.close_round()
    moved = vector(peer.state()) - vector(initial())
    want = torch.tensor([(1 * 1 + 5 * 5) / 6, 2.0, 0.0, 0.0]).repeat_interleave(SIZE // 4)
    torch.testing.assert_close(moved, want, rtol=1e-3, atol=1e-5)


class _Null(torch.optim.SGD):
    def __init__(self, parameters: Any) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))])


def test_ecolora_loses_nothing_of_the_segment_it_sends() -> None:
    peer = EcoLoRA(initial(), k_max=0.6)
    owed = torch.zeros(SIZE)
    for t in range(10):
        peer.memory(0).version = t
        update, part = drawn(t), peer.segment(0, t)
        got = peer.read(Reply(0, t, 1, peer.encode(0, update)))
        left = peer.memory(0).residual
        want = torch.zeros(SIZE)
        want[part] = update[part] + owed[part]
        torch.testing.assert_close((got + left)[part], want[part], rtol=0, atol=1e-6)
        assert left[part].any()
        kept = torch.ones(SIZE, dtype=torch.bool)
        kept[part] = False
        assert torch.equal(left[kept], owed[kept])
        owed = left.clone()


def test_ecolora_sends_less_as_the_loss_falls_and_less_of_b() -> None:
    peer = EcoLoRA(initial(), segments=1)
    assert peer.shares(0) == (0.95, 0.95)
    a, b = peer.shares(10)
    assert (a, b) == pytest.approx((0.6 + 0.35 * math.exp(-1), 0.5 + 0.45 * math.exp(-2)))
    peer.loss_progress = 0.0
    assert peer.shares(10) == (0.95, 0.95)
    peer.loss_progress = -1.0
    assert peer.shares(10) == (0.95, 0.95)
    peer.loss_progress = 3.0
    got = peer.read(Reply(0, 0, 1, peer.encode(0, drawn(0)))) != 0
    is_a = torch.arange(SIZE) // 400 % 2 == 0
    a, b = peer.shares(0)
    counts = int(got[is_a].sum()), int(got[~is_a].sum())
    assert counts == (math.ceil(800 * a), math.ceil(800 * b))


def test_ecolora_mixes_a_clients_own_result_in_by_its_age() -> None:
    peer = EcoLoRA(initial(), mixing=0.5)
    end = trained(peer, 0, 0, peer.deliver(0)[1])
    peer.receive(peer.reply(0, *end, 1))
    peer.close_round()
    for t in (1, 2):
        state = peer.deliver(0)[1]
        weight = math.exp(-0.5 * t)
        want = weight * vector(end[1]) + (1 - weight) * peer.memory(0).held
        torch.testing.assert_close(vector(state), want)
        peer.receive(peer.reply(1, *trained(peer, 1, t, peer.deliver(1)[1]), 1))
        peer.close_round()


def test_sparseloco_keeps_k_of_every_chunk() -> None:
    got = loco().decode(loco().encode(0, drawn(2))) != 0
    chunks = [int(c.sum()) for c in got.split(256)]
    assert chunks == [16] * 7
    with pytest.raises(ConfigError):
        SparseLoCo(initial(), k=4)


def test_ffa_leaves_a_alone_and_sends_b_exactly() -> None:
    peer = FFALoRA(initial())
    federate(peer)
    start, state = initial(), peer.state()
    assert list(state) == list(start)
    for name, t in state.items():
        assert torch.equal(t, start[name]) == name.endswith("lora_A.weight")
    parameters = {n: nn.Parameter(t) for n, t in start.items()}
    optimizer = peer.optimizer(0, parameters, torch.optim.AdamW, lr=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for n, p in parameters.items() if "lora_B" in n}
    with pytest.raises(ConfigError, match="lora_A"):
        FFALoRA({"w": torch.zeros(3)})


def test_a_random_subspace_needs_no_download_and_two_bits_a_code() -> None:
    def make(seed: int = 0) -> Any:
        return random_subspace(initial(), ratio=4, seed=seed)

    method = make()
    assert method.codec_bytes == 0
    blobs = []
    for t in range(ROUNDS):
        for c in range(CLIENTS):
            state = method.deliver(c)[1]
            blob = method.reply(c, *trained(method, c, t, state), examples(c))
            method.receive(blob)
            blobs.append(len(blob))
        method.close_round()
    codes = method.server.uplink.code_numel(method.server.replica.spec)
    assert codes == SIZE // 4
    assert max(blobs) < codes / 4 + 4 * 2 + 80, "two bits, two scales a block, headers"
    for name, (axis, u) in method.server.uplink.outer.bases().items():
        k = u.shape[1]
        torch.testing.assert_close(u.T @ u, torch.eye(k), atol=1e-5, rtol=0)
        moved = method.state()[name] - initial()[name]
        moved = moved if axis.left else moved.T
        torch.testing.assert_close(u @ (u.T @ moved), moved, atol=1e-5, rtol=0)
        assert moved.any()
    same, other = make().server.uplink, make(1).server.uplink
    assert same.code_space == method.server.uplink.code_space != other.code_space


def test_casts_refuse_unknown_kinds() -> None:
    with pytest.raises(ConfigError, match="normfloat4"):
        Cast(initial(), kind="nf4")


# Positions and envelopes.


@given(st.integers(1, 500), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_positions_come_back_in_no_more_than_a_bitmap(size: int, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions = np.flatnonzero(rng.random(size) < share)
    body = encode_positions(positions, size)
    assert np.array_equal(decode_positions(body, size, len(positions)), positions)
    assert len(body) <= 1 + (size + 7) // 8


@pytest.mark.parametrize("density", [0.01, 0.125, 0.5, 0.9])
def test_random_positions_cost_about_their_entropy(density: float) -> None:
    size = 100_000
    positions = np.flatnonzero(np.random.default_rng(0).random(size) < density)
    entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    ratio = 8 * len(encode_positions(positions, size)) / (size * entropy)
    assert 0.99 < ratio < 1.05


@given(st.binary(max_size=40), st.integers(1, 200), st.integers(0, 250))
def test_any_bytes_are_positions_or_a_wire_error(body: bytes, size: int, count: int) -> None:
    try:
        positions = decode_positions(body, size, count)
    except WireError:
        return
    assert len(positions) == count
    assert bool((np.diff(positions) > 0).all())
    assert count == 0 or 0 <= positions[0] <= positions[-1] < size


parts = st.lists(st.binary(max_size=20), max_size=4).map(tuple)


@given(st.integers(0, 2**32 - 1), parts)
def test_a_broadcast_comes_back(number: int, given_parts: tuple[bytes, ...]) -> None:
    message = Broadcast(number, given_parts)
    blob = message.to_bytes()
    assert Broadcast.from_bytes(blob) == message
    lengths = 4 * max(0, len(given_parts) - 1)
    assert len(blob) == BROADCAST_OVERHEAD + lengths + sum(map(len, given_parts))


@given(st.binary(max_size=60))
def test_any_sealed_bytes_are_a_broadcast_or_a_wire_error(message: bytes) -> None:
    blob = message + zlib.crc32(message).to_bytes(4, "little")
    for kind in (Broadcast, Reply):
        try:
            kind.from_bytes(blob)
        except WireError:
            continue


def test_envelopes_notice_a_flipped_bit_and_no_examples() -> None:
    blob = bytearray(Reply(1, 2, 3, b"body").to_bytes())
    blob[9] ^= 1
    with pytest.raises(ChecksumError):
        Reply.from_bytes(bytes(blob))
    with pytest.raises(MalformedBodyError, match="at least one example"):
        Reply.from_bytes(Reply(1, 2, 0, b"body").to_bytes())
