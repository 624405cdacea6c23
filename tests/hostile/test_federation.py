"""A federation with messages lost, delayed, doubled, damaged, forged, and a server that forgets.

Whatever happens, a client is at a state that its server's history holds under the same lineage, or
was told so by a named error, and finds back. ``GRADCODEC_HOSTILE=long`` plays for longer.
"""

import os
import resource
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
import torch
from federated.toy import reply
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from torch import Tensor

from gradcodec.errors import ConfigError, TrainingError, WireError
from gradcodec.federated import AutoClient, AutoConfig, AutoServer, Client, Server
from gradcodec.federated.envelope import Broadcast, Reply
from gradcodec.registry import make_codec
from gradcodec.transforms.subspace.config import SubspaceConfig

LONG = os.environ.get("GRADCODEC_HOSTILE") == "long"
N = 48
INITIAL = {"w": torch.zeros(6, 8), "running_var": torch.ones(3), "count": torch.tensor([1, 2])}
AUTO = AutoConfig(warmup_rounds=2, subspace=SubspaceConfig(ratio=2), refresh_rounds=(4,))

damage = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3)


def damaged(blob: bytes, changes: list[tuple[int, int]]) -> bytes:
    out = bytearray(blob)
    for at, value in changes:
        out[at % len(out)] = value
    return bytes(out)


class Federation(RuleBasedStateMachine):
    """One server, three clients, an attacker who holds every message that was ever sent."""

    broadcasts = Bundle("broadcasts")
    replies = Bundle("replies")
    checkpoints = Bundle("checkpoints")

    def make(self) -> tuple[Server, list[Client]]:
        server = Server(INITIAL, make_codec("int4"))
        return server, [Client(i, INITIAL, make_codec("int4")) for i in range(3)]

    def __init__(self) -> None:
        super().__init__()
        self.server, self.clients = self.make()
        self.positions: dict[bytes, Tensor] = {}
        self.steps = 0
        self.remember()

    def remember(self) -> None:
        """What the server's position is under each lineage that it ever had."""
        replica = self.server.replica
        known = self.positions.setdefault(replica.lineage, replica.position)
        assert torch.equal(known, replica.position)

    def trained(self, client: Client, size: float) -> dict[str, Tensor]:
        self.steps += 1
        g = torch.Generator().manual_seed(self.steps)
        state = client.replica.state()
        return {
            "w": state["w"] + size * torch.randn(6, 8, generator=g),
            "running_var": state["running_var"] + 0.1,
            "count": state["count"] + 1,
        }

    @rule(target=broadcasts, version=st.integers(0, 8))
    def broadcast(self, version: int) -> bytes:
        try:
            return self.server.broadcast(version)
        except ConfigError:
            return self.server.broadcast(0)

    @rule(number=st.integers(0, 2), blob=broadcasts)
    def deliver(self, number: int, blob: bytes) -> None:
        """On time, late, twice, to anybody."""
        with suppress(WireError):
            self.clients[number].receive(blob)

    @rule(number=st.integers(0, 2), blob=broadcasts, changes=damage)
    def deliver_damaged(self, number: int, blob: bytes, changes: list[tuple[int, int]]) -> None:
        with suppress(WireError):
            self.clients[number].receive(damaged(blob, changes))

    @rule(number=st.integers(0, 2))
    def catch_up(self, number: int) -> None:
        """What an honest client does; the way back that errors name always works."""
        client = self.clients[number]
        try:
            client.receive(self.server.broadcast(client.version))
        except (WireError, ConfigError):
            client.reset()
            client.receive(self.server.broadcast(client.version))
        assert client.replica.digest == self.server.replica.digest
        assert torch.equal(client.replica.position, self.server.replica.position)

    @rule(target=replies, number=st.integers(0, 2), size=st.sampled_from([0.1, 1e3, 1e37]))
    def train(self, number: int, size: float) -> bytes:
        client = self.clients[number]
        return client.reply(self.trained(client, size), examples=1 + self.steps)

    @rule(blob=replies)
    def hear(self, blob: bytes) -> None:
        before = self.server.replies
        try:
            came = self.server.receive(blob)
        except WireError:
            assert self.server.replies == before
        else:
            assert came.client in self.server.replies

    @rule(blob=replies, changes=damage)
    def hear_damaged(self, blob: bytes, changes: list[tuple[int, int]]) -> None:
        with suppress(WireError):
            self.server.receive(damaged(blob, changes))

    @rule(number=st.integers(0, 2**64 - 1), examples=st.integers(1, 2**63 - 1))
    def forge(self, number: int, examples: int) -> None:
        """A reply to the current state that nobody trained."""
        forged = reply(self.server, number, {"w": torch.full((6, 8), 1e37)}, examples)
        with suppress(WireError):
            self.server.receive(forged.to_bytes())

    @rule()
    def close(self) -> None:
        with suppress(TrainingError):
            self.server.close_round()
        self.remember()

    @rule(target=checkpoints)
    def save(self) -> dict[str, Tensor]:
        return {n: t.clone() for n, t in self.server.state_dict().items()}

    @rule(state=checkpoints)
    def restart(self, state: dict[str, Tensor]) -> None:
        self.server, _ = self.make()
        self.server.load_state_dict(state)
        self.remember()

    @rule(state=consumes(checkpoints), at=st.integers(0, 10**6))
    def restart_from_a_swapped_checkpoint(self, state: dict[str, Tensor], at: int) -> None:
        names = sorted(n for n in state if n.startswith("increment."))
        if len(names) > 1:
            one, other = names[at % len(names)], names[(at + 1) % len(names)]
            state[one], state[other] = state[other], state[one]
            before = self.server.replica.digest
            with suppress(WireError, ConfigError):
                self.server.load_state_dict(state)
                self.remember()
                return
            assert self.server.replica.digest == before

    @invariant()
    def everything_is_finite_and_somewhere_in_the_history(self) -> None:
        for t in self.server.replica.state().values():
            assert bool(torch.isfinite(t.double()).all())
        for client in self.clients:
            known = self.positions.get(client.replica.lineage)
            assert known is not None, f"client at a state that no server was at: {client.version}"
            assert torch.equal(client.replica.position, known)


class AutoFederation(Federation):
    """The same with a codec that changes on the way."""

    def make(self) -> tuple[Server, list[Client]]:
        clients: list[Client] = [AutoClient(i, INITIAL, AUTO) for i in range(3)]
        return AutoServer(INITIAL, AUTO), clients


LIMITS = settings(max_examples=400 if LONG else 25, stateful_step_count=60, deadline=None)
TestFederation = Federation.TestCase
TestFederation.settings = LIMITS
TestAutoFederation = AutoFederation.TestCase
TestAutoFederation.settings = LIMITS


FLOOD = """
import dataclasses, resource, sys
sys.path[:0] = sys.argv[1:2]
import torch
from federated.toy import reply
from gradcodec.federated import Server, ServerConfig
from gradcodec.registry import make_codec

count, numel = map(int, sys.argv[2:])
initial = {"w": torch.zeros(numel)}
server = Server(initial, make_codec("sign"), config=ServerConfig(hold_bytes=1 << 20))
one = reply(server, 0, {"w": torch.randn(numel)})
for number in range(20):
    server.receive(dataclasses.replace(one, client=number).to_bytes())
sent, before = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for number in range(20, count):
    blob = dataclasses.replace(one, client=2**63 + number).to_bytes()
    sent += len(blob)
    server.receive(blob)
print(sent // 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_of_a_round_does_not_grow_with_its_replies() -> None:
    """600 of 0.8 MB, 25 kB each on the wire: neither a dense vector each nor their bytes."""
    tests = str(os.path.dirname(os.path.dirname(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", FLOOD, tests, str(6000 if LONG else 600), "200000"],
        capture_output=True,
        text=True,
        timeout=600 if LONG else 110,
        check=True,
    )
    sent_kb, grown_kb = map(int, done.stdout.split())
    assert sent_kb > 14_000
    assert grown_kb < 6_000


@pytest.mark.parametrize("count", [20_000 if LONG else 1_500])
def test_mutated_messages_raise_named_errors_only(count: int) -> None:
    server, client = Server(INITIAL, make_codec("int4")), Client(0, INITIAL, make_codec("int4"))
    one = reply(server, 5, {"w": torch.ones(6, 8)})
    good: dict[type[Any], bytes] = {Reply: one.to_bytes()}
    server.receive(good[Reply])
    server.close_round()
    good[Broadcast] = server.broadcast(0)
    g = torch.Generator().manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        kind = (Reply, Broadcast)[number % 2]
        blob = bytearray(good[kind])
        for _ in range(1 + number % 3):
            at = int(torch.randint(len(blob) - 4, (), generator=g))
            blob[at] = int(torch.randint(256, (), generator=g))
        if number % 5 == 0:
            blob = blob[: int(torch.randint(len(blob), (), generator=g))] + bytes(4)
        import zlib

        sealed = bytes(blob[:-4]) + (zlib.crc32(blob[:-4]) ^ 0xFFFFFFFF).to_bytes(4, "little")
        with suppress(WireError):
            server.receive(sealed) if kind is Reply else client.receive(sealed)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
