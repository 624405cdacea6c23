"""FedKSeed: scalars cross, and weights follow from them alike at both ends."""

import math
import struct

import pytest
import torch
from torch import Tensor, nn

from benchmarks.federated.methods import State
from benchmarks.peers.federated import FedKSeed
from benchmarks.peers.federated.body import count_bytes
from benchmarks.peers.federated.envelope import BROADCAST_OVERHEAD, REPLY_OVERHEAD, Reply
from benchmarks.peers.federated.fedkseed import SeedOptimizer
from benchmarks.peers.rice import encode_positions
from gradcodec.errors import ConfigError, LimitError, MalformedBodyError, TruncatedError, WireError

SEEDS, DRAWS, STEPS = 256, 8, 2


def initial() -> State:
    g = torch.Generator().manual_seed(1)
    return {"a": torch.randn(4, 10, generator=g), "b": torch.zeros(6)}


SIZE = sum(t.numel() for t in initial().values())


class Counted(FedKSeed):
    """Says how many directions were drawn to rebuild weights and to train."""

    drawn = 0

    def direction(self, j: int) -> Tensor:
        self.drawn += 1
        return super().direction(j)


def peer(seeds: int = SEEDS, draws: int = DRAWS) -> Counted:
    return Counted(initial(), seeds=seeds, draws=draws)


def vector(state: State) -> Tensor:
    return torch.cat([t.reshape(-1) for t in state.values()])


def gradient(seed: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))


def trained(
    method: FedKSeed, client: int, state: State, grads: list[Tensor], lr: float = 0.1
) -> tuple[SeedOptimizer, State]:
    """A step by each of the made-up gradients."""
    parameters = {n: nn.Parameter(t.clone()) for n, t in state.items()}
    optimizer = method.optimizer(client, parameters, torch.optim.AdamW, lr=lr, weight_decay=0.0)
    assert isinstance(optimizer, SeedOptimizer)
    for grad in grads:
        for p, part in zip(parameters.values(), grad.split([40, 6]), strict=True):
            p.grad = part.view(p.shape)
        optimizer.step()
    return optimizer, {n: p.detach() for n, p in parameters.items()}


def answer(method: FedKSeed, client: int, state: State) -> bytes:
    grads = [gradient(10 * method.memory(client).version + client + 100 * i) for i in range(STEPS)]
    return method.reply(client, *trained(method, client, state, grads), 3 + client)


def play(server: FedKSeed, sides: dict[int, FedKSeed], clients: list[int]) -> list[int]:
    """A round with an instance for each end; the bytes of the broadcasts."""
    sizes = []
    for c in clients:
        blob = server.broadcast(c)
        server.receive(answer(sides[c], c, sides[c].arrive(c, blob)))
        sizes.append(len(blob) - BROADCAST_OVERHEAD)
    server.close_round()
    return sizes


# A step


def test_a_step_goes_where_its_scalars_say() -> None:
    method = peer()
    state = method.deliver(0)[1]
    optimizer, end = trained(method, 0, state, [gradient(0)])
    moved = optimizer.moved.nonzero().flatten().tolist()
    assert len(moved) == DRAWS
    want = torch.zeros(SIZE)
    for j in moved:
        z = method.direction(j)
        torch.testing.assert_close(optimizer.moved[j], -0.1 / DRAWS * (gradient(0) @ z))
        want += optimizer.moved[j] * z
    torch.testing.assert_close(vector(end) - vector(state), want, rtol=1e-5, atol=1e-6)


def test_all_seeds_together_say_the_gradient() -> None:
    """``sum_j <g, z_j> z_j / K`` has a relative squared error of ``(n + 1) / K``."""
    method = peer(seeds=8192, draws=8192)
    state = method.deliver(0)[1]
    end = trained(method, 0, state, [gradient(0)], lr=1.0)[1]
    error = (vector(state) - vector(end) - gradient(0)).norm() / gradient(0).norm()
    assert error < 1.5 * math.sqrt((SIZE + 1) / 8192)


def test_a_few_seeds_say_what_all_say_in_the_mean() -> None:
    method, count = peer(), 1000
    parts = [method.direction(j) for j in range(SEEDS)]
    want = sum(float(gradient(0) @ z) / SEEDS * z for z in parts)
    steps = []
    for client in range(count):
        state = method.deliver(client)[1]
        end = trained(method, client, state, [gradient(0)], lr=1.0)[1]
        steps.append(vector(state) - vector(end))
    one = float(torch.stack([(s - want).norm() for s in steps]).square().mean().sqrt())
    error = float((torch.stack(steps).mean(0) - want).norm())
    assert error < 1.5 * one / math.sqrt(count), "independent errors shrink as 1/sqrt(count)"
    assert one > float(want.norm()), "a few seeds alone are mostly noise"


def test_directions_are_normal_and_nearly_orthogonal() -> None:
    method = FedKSeed({"w": torch.zeros(4000)})
    z = torch.stack([method.direction(j) for j in (0, 1, 2, 4095)])
    gram = z @ z.T / 4000
    torch.testing.assert_close(gram, torch.eye(4), rtol=0, atol=5 * math.sqrt(2 / 4000))


# Both ends


def test_a_client_that_was_away_arrives_at_the_servers_weights() -> None:
    server, sides = peer(), {c: peer() for c in range(3)}
    for clients in ([0, 1, 2], [0, 2], [0, 2], [0, 1, 2]):
        play(server, sides, clients)
    for c, side in sides.items():
        state = side.arrive(c, server.broadcast(c))
        assert torch.equal(side.memory(c).held, server.downlink.vector)
        # Sums are fp64 and rounded once: the last bit of fp32 at most.
        torch.testing.assert_close(vector(state), vector(server.state()), rtol=2**-23, atol=1e-9)
    assert not torch.equal(vector(server.state()), vector(initial()))


def test_a_new_client_gets_all_scalars_where_the_rounds_are_more_bytes() -> None:
    server, sides = peer(), {c: peer() for c in range(4)}
    for _ in range(12):
        play(server, sides, [0, 1, 2])
    blob = server.broadcast(3)
    assert len(blob) == BROADCAST_OVERHEAD + 4 * SEEDS
    state = sides[3].arrive(3, blob)
    torch.testing.assert_close(vector(state), vector(server.state()), rtol=2**-23, atol=1e-9)


def test_catching_up_draws_the_directions_that_changed_alone() -> None:
    server, sides = peer(), {c: peer() for c in range(2)}
    for clients in ([0, 1], [0]):
        play(server, sides, clients)
    drawn = sides[1].drawn
    before = sides[1].memory(1).held
    sides[1].arrive(1, server.broadcast(1))
    changed = int((server.downlink.vector != before).sum())
    assert sides[1].drawn - drawn == changed < SEEDS
    drawn = server.drawn
    server.state()
    assert server.drawn == drawn, "the server keeps its weights"


# Bytes


def test_a_reply_of_the_default_has_less_than_a_kilobyte() -> None:
    """192 draws of 4096: four bytes for each, and about six bits for which it is."""
    method = FedKSeed(initial())
    state = method.deliver(0)[1]
    optimizer, end = trained(method, 0, state, [gradient(i) for i in range(6)])
    count = int(optimizer.moved.count_nonzero())
    assert 180 < count <= 192, "a seed that is drawn again is sent once"
    size = len(method.reply(0, optimizer, end, 5)) - REPLY_OVERHEAD
    assert 4 + 4.6 * count < size < 4 + 4.9 * count
    assert method.codec_bytes == 0


def test_no_broadcast_has_more_than_all_scalars() -> None:
    server, sides = peer(), {c: peer() for c in range(3)}
    sizes = [size for t in range(8) for size in play(server, sides, [0, 1] if t % 7 else [0, 1, 2])]
    assert sizes[:3] == [0, 0, 0], "nothing is sent before the first round is closed"
    assert max(sizes) <= 4 * SEEDS
    assert max(sizes[3:-3]) < 4 + 5 * 3 * DRAWS * STEPS, "a round's are those of its clients"


def body(count: int, values: bytes, positions: bytes) -> bytes:
    return count_bytes(count) + values + positions


WHERE = encode_positions(torch.tensor([3, SEEDS - 1]).numpy(), SEEDS)
BEYOND = encode_positions(torch.tensor([3, 2 * SEEDS - 1]).numpy(), 2 * SEEDS)
HOSTILE = {
    "more than the bytes": (body(2**32 - 1, bytes(8), WHERE), TruncatedError),
    "more than the seeds": (body(SEEDS + 1, bytes(4 * (SEEDS + 1)), b""), LimitError),
    "an index out of range": (body(2, bytes(8), BEYOND), MalformedBodyError),
    "infinite": (body(2, struct.pack("<2f", 1, math.inf), WHERE), MalformedBodyError),
    "not a number": (body(2, struct.pack("<2f", math.nan, 1), WHERE), MalformedBodyError),
    "bytes behind the end": (body(2, bytes(8), WHERE + b"\0"), MalformedBodyError),
    "nothing": (b"", TruncatedError),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused(name: str) -> None:
    blob, error = HOSTILE[name]
    method = peer()
    with pytest.raises(error) as caught:
        method.receive(Reply(0, 0, 1, blob).to_bytes())
    assert isinstance(caught.value, WireError)
    method.receive(Reply(0, 0, 1, body(2, bytes(8), WHERE)).to_bytes())


def test_settings_and_optimizers_that_do_not_fit_are_refused() -> None:
    for seeds, draws in ((8, 9), (8, 0), (0, 0)):
        with pytest.raises(ConfigError, match="draws"):
            peer(seeds, draws)
    method = peer()
    state = method.deliver(0)[1]
    other = torch.optim.SGD([nn.Parameter(t) for t in state.values()], lr=1.0)
    with pytest.raises(ConfigError, match="SGD"):
        method.reply(0, other, state, 1)
