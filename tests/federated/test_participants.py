"""Laws of ids and weights: what names a client elsewhere names it here, or is refused at once."""

from typing import Any

import numpy as np
import pytest
import torch
from federated.toy import Toy, equal, reply
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradcodec.codecs import Identity
from gradcodec.errors import ConfigError, EmptyClientError, UnexpectedReplyError, UpdateError
from gradcodec.faf import LatentOptimizer
from gradcodec.federated import AutoClient, AutoConfig, AutoServer, Client, Server, ServerConfig
from gradcodec.federated.envelope import Reply
from gradcodec.federated.participants import ClientId, client_id, example_count, in_order
from gradcodec.registry import make_codec
from gradcodec.transforms.subspace.config import SubspaceConfig

INITIAL = Toy().initial
LATENT = ServerConfig(mode="latent")
AUTO = AutoConfig(subspace=SubspaceConfig(ratio=2))


def client(number: Any = 0, codec: str = "fp32", config: ServerConfig | None = None) -> Client:
    return Client(number, INITIAL, make_codec(codec), config=config)


@pytest.mark.parametrize(
    "number", [0, 2**32, 2**63, 2**64 - 1, "site-3", "Zürich", "3", np.int64(7), np.uint64(2**63)]
)
def test_a_client_of_any_id_is_heard(number: Any) -> None:
    server = Server(INITIAL, Identity())
    server.receive(client(number).reply(INITIAL, 4))
    assert server.replies == (number,)
    assert type(server.replies[0]) in (int, str)
    auto = AutoServer(INITIAL, AUTO)
    auto.receive(AutoClient(number, INITIAL, AUTO).reply(INITIAL, 4))
    assert auto.replies == (number,)


@pytest.mark.parametrize(
    "number", [-1, 2**64, 1.0, None, True, "", "x" * 256, "\ud800", b"7", torch.tensor(1.5)]
)
def test_what_is_no_id_is_refused_where_the_client_is_made(number: Any) -> None:
    with pytest.raises(ConfigError, match=r"client id of 0\.\.2\^64 - 1 or a name"):
        client(number)
    with pytest.raises(ConfigError, match="client id"):
        Server(INITIAL, Identity()).invite([number])


@pytest.mark.parametrize("examples", [1, 10.0, np.int32(4), np.float32(4), 2**32, 2**63 - 1])
def test_any_whole_number_of_examples_is_a_weight(examples: Any) -> None:
    blob = client().reply(INITIAL, examples)
    assert Reply.from_bytes(blob).examples == int(examples)
    Server(INITIAL, Identity()).receive(blob)


@pytest.mark.parametrize("examples", [2.5, "3", None, True, float("nan"), float("inf"), 2**63])
def test_other_numbers_of_examples_are_named(examples: Any) -> None:
    with pytest.raises(ConfigError, match="client 0: expected a whole number of examples"):
        client().reply(INITIAL, examples)


@pytest.mark.parametrize("examples", [0, -1, 0.0, -(2**70)])
def test_no_examples_are_an_empty_client(examples: Any) -> None:
    with pytest.raises(EmptyClientError, match="client 'a': expected at least one example"):
        client("a").reply(INITIAL, examples)


ids = st.one_of(
    st.integers(0, 2**64 - 1), st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
)


@given(st.lists(ids, unique=True, max_size=20), st.randoms())
def test_ids_of_both_kinds_have_one_order(some: list[ClientId], random: Any) -> None:
    shuffled = list(some)
    random.shuffle(shuffled)
    assert sorted(shuffled, key=in_order) == sorted(some, key=in_order)
    assert [client_id(i) for i in some] == some


@given(st.integers(1, 2**63 - 1))
def test_whole_numbers_stay_what_they_are(number: int) -> None:
    assert example_count(number, "x") == number


def test_the_order_of_arrival_does_not_matter_among_names_and_numbers() -> None:
    ends = []
    names: list[ClientId] = ["b", 2**63, "a", 3, "ä", 0]
    for order in (names, names[::-1]):
        server = Server(INITIAL, Identity())
        for name in order:
            seed = 1 + in_order(name)[1] % 97 + len(str(name))
            g = torch.Generator().manual_seed(seed)
            update = {n: torch.randn(t.shape, generator=g) for n, t in INITIAL.items()}
            server.receive(reply(server, name, update, seed).to_bytes())
        ends.append(server.close_round())
    assert ends[0] == ends[1]


def test_clients_of_stochastic_codecs_draw_seeds_of_their_own() -> None:
    update = {n: t + 1 for n, t in INITIAL.items()}
    numbers: list[ClientId] = [0, 1, "0", "1", 2**63, 2**64 - 1]
    bodies = [
        Reply.from_bytes(client(n, "int4-unbiased").reply(update, 1)).payload.body for n in numbers
    ]
    assert len(set(bodies)) == len(numbers)


# -- who is invited ------------------------------------------------------------------------------


def test_only_invited_clients_are_heard_and_their_memory_is_what_they_sent() -> None:
    server = Server(INITIAL, Identity())
    server.receive(client(9).reply(INITIAL, 1))
    with pytest.raises(ConfigError, match=r"9 has replied and is not invited"):
        server.invite([1, "b"])
    server.abandon_round()
    server.invite([1, "b"])
    assert server.replies == ()
    with pytest.raises(UnexpectedReplyError, match="client 9 was not invited to round 0"):
        server.receive(client(9).reply(INITIAL, 1))
    server.receive(client("b").reply(INITIAL, 1))
    server.close_round()
    server.receive(reply(server, 9, INITIAL).to_bytes())  # an invitation is for one round


def test_a_reply_in_anothers_name_is_refused_and_does_not_lock_it_out() -> None:
    server = Server(INITIAL, Identity())
    forged = client(3).reply(INITIAL, 1)
    with pytest.raises(UnexpectedReplyError, match="client 3: a reply that 666 sent in its name"):
        server.receive(forged, sender=666)
    server.receive(client(3).reply(INITIAL, 1), sender=3)
    assert server.replies == (3,)


def test_a_round_holds_no_more_replies_than_it_is_told() -> None:
    server = Server(INITIAL, Identity(), config=ServerConfig(max_replies=2))
    for number in (5, 6):
        server.receive(client(number).reply(INITIAL, 1))
    with pytest.raises(UnexpectedReplyError, match=r"2 replies already, ServerConfig\.max_replies"):
        server.receive(client(7).reply(INITIAL, 1))
    server.drop(5)
    server.receive(client(7).reply(INITIAL, 1))
    assert server.replies == (6, 7)
    with pytest.raises(ConfigError, match=r"of \(6, 7\): 5"):
        server.drop(5)


# -- what a client is given ------------------------------------------------------------------------


def parameters() -> dict[str, nn.Parameter]:
    return {n: nn.Parameter(t.clone()) for n, t in INITIAL.items()}


def test_an_optimiser_that_a_framework_wrapped_is_unwrapped() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate, part of .[dev]")
    one = client(0, config=LATENT)
    optimizer = LatentOptimizer(parameters(), one.codec, torch.optim.SGD, lr=0.1)
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert type(prepared).__name__ == "AcceleratedOptimizer"
    assert one.reply(prepared, 3) == one.reply(optimizer, 3)


def test_an_optimiser_of_another_codec_is_refused_by_the_client() -> None:
    one = client(0, config=LATENT)
    codec = Identity().bind(one.replica.spec)
    optimizer = LatentOptimizer(parameters(), codec, torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match=r"LatentOptimizer\(model, client.codec"):
        one.reply(optimizer, 3)


def test_an_optimiser_of_another_round_is_refused_until_it_is_rebased() -> None:
    server = Server(INITIAL, Identity(), config=LATENT)
    one, named = server.client(0), parameters()
    optimizer = LatentOptimizer(named, one.codec, torch.optim.SGD, lr=0.1)
    totals = []
    for number in range(3):
        state = one.receive(server.broadcast(one.version))
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(state[name])
        if number:
            with pytest.raises(ConfigError, match=r"optimizer.rebase\(\) or make a new"):
                one.reply(optimizer, 3)
            optimizer.rebase()
        optimizer.zero_grad()
        sum(p.sum() for p in named.values()).backward()
        optimizer.step()
        server.receive(one.reply(optimizer, 3))
        server.close_round()
        totals.append(float(server.replica.position.sum()))
    n = sum(t.numel() for t in INITIAL.values())
    assert totals == pytest.approx([-0.1 * n, -0.2 * n, -0.3 * n], rel=1e-5)


def test_parameters_that_somebody_else_changed_are_refused_in_code_space() -> None:
    one, named = client(0, config=LATENT), parameters()
    optimizer = LatentOptimizer(named, one.codec, torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        named["bias"].add_(1)
    with pytest.raises(ConfigError, match="somebody else has written into its parameters"):
        one.reply(optimizer, 3)


def test_an_ordinary_optimiser_is_no_reply() -> None:
    optimizer = torch.optim.SGD(list(parameters().values()), lr=0.1)
    with pytest.raises(UpdateError, match="the trained module, its tensors or a LatentOptimizer"):
        client().reply(optimizer, 3)  # type: ignore[arg-type]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)


def test_a_wrapped_model_is_the_model() -> None:
    model = Model()
    compiled = torch.compile(model, backend="eager")
    server = Server(model, make_codec("int8"))
    one = Client(0, compiled, make_codec("int8"))
    assert one.codec.digest == server.uplink.digest
    with torch.no_grad():
        model.inner.weight.add_(1)
    server.receive(one.reply(compiled, 2))
    wrapped = {f"_orig_mod.{n}": t for n, t in model.state_dict().items()}
    other = Client(1, wrapped, make_codec("int8"))
    assert equal(dict(other.replica.state()), model.state_dict())
