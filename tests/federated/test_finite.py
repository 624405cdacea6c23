"""Laws of what comes out of a round: it is finite, or the replies that spoil it are dropped."""

import logging
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from federated.toy import equal, reply
from torch import Tensor

from gradcodec.codecs import Identity
from gradcodec.errors import MalformedBodyError, TrainingError
from gradcodec.federated import AutoConfig, AutoServer, Server, ServerConfig
from gradcodec.federated.envelope import Reply
from gradcodec.registry import make_codec
from gradcodec.transforms.subspace.config import SubspaceConfig

N = 512
INITIAL = {"w": torch.zeros(N)}
TOP = torch.finfo(torch.float32).max


def update(value: float, seed: int | None = None) -> dict[str, Tensor]:
    if seed is None:
        return {"w": torch.full((N,), value)}
    return {"w": value * torch.randn(N, generator=torch.Generator().manual_seed(seed))}


def assert_finite(server: Server) -> None:
    assert all(bool(torch.isfinite(t).all()) for t in server.replica.state().values())
    assert bool(torch.isfinite(server.momentum).all() & torch.isfinite(server.residual).all())


@pytest.mark.parametrize("codec", ["fp32", "int8", "int4", "topk"])
@pytest.mark.parametrize("loud", [1, 3])
def test_a_loud_reply_is_dropped_and_named(
    codec: str, loud: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Sums of what each reply brings are beyond fp32; alone each is finite."""
    config = ServerConfig(aggregation="sum")
    server = Server(INITIAL, make_codec(codec), config=config)
    alone = Server(INITIAL, make_codec(codec), config=config)
    names = [f"bad-{i}" for i in range(loud)]
    for client in range(4):
        blob = reply(server, client, update(0.1, seed=client)).to_bytes()
        server.receive(blob)
        alone.receive(blob)
    # One that is half the range is one too many beside another round's; three are in this one.
    for name in names:
        server.receive(reply(server, name, update(0.2 * TOP)).to_bytes())
    if loud == 1:
        server.residual = torch.full_like(server.residual, 0.9 * TOP)
        alone.residual = server.residual.clone()
    else:
        for name in ("bad-9", "bad-8", "bad-7"):
            server.receive(reply(server, name, update(0.2 * TOP)).to_bytes())
    with caplog.at_level(logging.WARNING, "gradcodec.federated"):
        server.close_round()
    assert_finite(server)
    assert server.dropped
    assert all(str(name).startswith("bad-") for name in server.dropped)
    for name in server.dropped:
        assert f"the reply of client {name!r} was dropped" in caplog.text
    assert server.round == 1
    server.receive(reply(server, 0, update(0.1, seed=9)).to_bytes())
    server.close_round()
    assert server.dropped == ()


def test_only_as_many_are_dropped_as_must_be() -> None:
    server = Server(INITIAL, Identity(), config=ServerConfig(aggregation="sum"))
    for client, share in enumerate((0.1, 0.5, 0.4, 0.3, 0.2)):
        server.receive(reply(server, client, update(share * TOP)).to_bytes())
    server.close_round()
    assert server.dropped == (1,)
    assert_finite(server)


def with_scales(one: Reply, value: float) -> Reply:
    """The reply with other scales, as no honest client sends them: large, and finite."""
    body = one.payload.body
    count = len(body) // 64  # generous: what lies behind the scales is codes, which any bytes are
    scales = torch.full((count,), value, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    return replace(one, payload=replace(one.payload, body=scales + body[len(scales) :]))


@pytest.mark.parametrize("mode", ["post", "latent"])
@pytest.mark.parametrize("codec", ["int2", "int4", "int8", "sign", "rotsign"])
@pytest.mark.parametrize(("scale", "examples"), [(1e37, 1), (1e37, 2**63 - 1), (2e38, 2**32 - 1)])
def test_a_forged_scale_does_not_close_the_round_for_good(
    mode: str, codec: str, scale: float, examples: int
) -> None:
    server = Server(INITIAL, make_codec(codec), make_codec("int4"), ServerConfig(mode=mode))
    for number in range(3):
        for client in range(3):
            server.receive(reply(server, client, update(0.1, seed=client)).to_bytes())
        forged = with_scales(reply(server, "x", update(0.1, seed=7), examples), scale)
        with suppress(MalformedBodyError):
            server.receive(forged.to_bytes())
        server.close_round()
        assert server.round == number + 1
        assert server.dropped in ((), ("x",))
        assert_finite(server)


def test_two_rounds_that_overflow_together_drop_the_second_loud_reply() -> None:
    server = Server(INITIAL, Identity())
    server.receive(reply(server, 0, update(3e38)).to_bytes())
    server.close_round()
    server.receive(reply(server, 0, update(3e38)).to_bytes())
    server.receive(reply(server, 1, update(-1.0), 2).to_bytes())
    server.close_round()
    assert_finite(server)
    server.receive(reply(server, 0, update(3e38)).to_bytes())
    with pytest.raises(TrainingError, match="diverged: w: expected finite values"):
        server.close_round()
    assert_finite(server)
    assert server.replies == (0,)  # the round is still open
    server.drop(0)
    server.receive(reply(server, 1, update(-1.0)).to_bytes())
    server.close_round()


def test_a_state_that_leaves_its_dtype_is_not_taken() -> None:
    server = Server({"w": torch.full((N,), 60000.0, dtype=torch.float16)}, Identity())
    half = {"w": torch.full((N,), 30000.0, dtype=torch.float16)}
    server.receive(reply(server, 0, half).to_bytes())
    with pytest.raises(TrainingError, match="w: expected finite values, 512 of 512"):
        server.close_round()
    small = {"w": torch.full((N,), -1000.0, dtype=torch.float16)}
    server.receive(reply(server, 1, small).to_bytes())
    server.close_round()
    assert server.dropped == (0,)
    assert server.replica.state()["w"].unique().tolist() == [59008.0]


def test_momentum_and_feedback_are_those_of_the_replies_that_stay() -> None:
    config = ServerConfig(aggregation="sum", momentum=0.5)
    server, alone = (Server(INITIAL, make_codec("int4"), config=config) for _ in range(2))
    for client in range(3):
        blob = reply(server, client, update(0.1, seed=client)).to_bytes()
        server.receive(blob)
        alone.receive(blob)
    for name in ("x", "y"):
        server.receive(reply(server, name, update(0.8 * TOP)).to_bytes())
    server.close_round()
    alone.close_round()
    if server.dropped == ("x", "y"):
        assert torch.equal(server.momentum, alone.momentum)
        assert torch.equal(server.residual, alone.residual)
        assert equal(server.replica.state(), alone.replica.state())
    else:
        assert set(server.dropped) <= {"x", "y"}
    assert_finite(server)


def test_subspace_auto_fits_on_no_reply_that_was_dropped() -> None:
    initial = {"a": torch.zeros(16, 32)}
    auto = AutoConfig(
        warmup_rounds=1, first="fp32", first_down="fp32", subspace=SubspaceConfig(ratio=2)
    )
    server, alone = (AutoServer(initial, auto) for _ in range(2))
    for client in range(4):
        g = torch.Generator().manual_seed(client % 2)
        blob = reply(server, client, {"a": torch.randn(16, 32, generator=g)}).to_bytes()
        server.receive(blob)
        alone.receive(blob)
    server.receive(reply(server, "x", {"a": torch.full((16, 32), TOP)}, 2**40).to_bytes())
    server.residual = torch.full_like(server.residual, 0.5 * TOP)
    server.close_round()
    alone.close_round()
    assert server.dropped == ("x",)
    assert (server.fits, alone.fits) == (1, 1)
    assert equal(server.uplink.weights, alone.uplink.weights)
