"""Laws of what must not be lost: buffers and integers travel bit for bit, whatever the codec."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from federated.toy import equal
from torch import Tensor, nn

from gradcodec.codec import Codec
from gradcodec.errors import ConfigError, MalformedBodyError, UpdateError
from gradcodec.faf import LatentOptimizer
from gradcodec.federated import AutoConfig, AutoServer, Client, Server, ServerConfig
from gradcodec.federated.envelope import VALUES, Broadcast, Reply
from gradcodec.federated.tensors import split
from gradcodec.per_tensor import PerTensor
from gradcodec.registry import make_codec
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import UpdateSpec

CLIENTS, CLASSES = 4, 3
AUTO = AutoConfig(warmup_rounds=2, subspace=SubspaceConfig(ratio=3))
LOSSY = ("int4-rotated", "rotsign", "int8", "topk", "bf16")


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, CLASSES))


def batch(client: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs of a mean and scale far from the running statistics' first values."""
    g = torch.Generator().manual_seed(1000 * seed + client)
    y = torch.randint(0, CLASSES, (32,), generator=g)
    centres = 4 * torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(5))
    return 3 + centres[y] + 0.5 * torch.randn(32, 8, generator=g), y


def loss_of(model: nn.Module) -> float:
    """In eval mode: what the running statistics are for."""
    model.eval()
    with torch.no_grad():
        parts = [batch(c, 99) for c in range(CLIENTS)]
        losses = [nn.functional.cross_entropy(model(x), y).item() for x, y in parts]
    model.train()
    return sum(losses) / len(losses)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, client: int, number: int) -> None:
    for step in range(4):
        x, y = batch(client, 10 * number + step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


class World:
    """A federation of BatchNorm networks, each client with a model of its own."""

    def __init__(self, codec: Codec, config: ServerConfig | None = None) -> None:
        self.server = Server(network(), codec, config=config)
        self.models = [network() for _ in range(CLIENTS)]
        self.clients = [Client(i, m, codec, config=config) for i, m in enumerate(self.models)]

    def round(self) -> None:
        for client, model in zip(self.clients, self.models, strict=True):
            state = client.receive(self.server.broadcast(client.version))
            model.load_state_dict(dict(state))
            optimizer: torch.optim.Optimizer
            if client.config.mode == "latent":
                optimizer = LatentOptimizer(model, client.codec, torch.optim.SGD, lr=0.1)
                train(model, optimizer, int(client.number), self.server.round)
                blob = client.reply(optimizer, 32, buffers=model)
            else:
                optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
                train(model, optimizer, int(client.number), self.server.round)
                blob = client.reply(model, 32)
            self.server.receive(blob)
        self.server.close_round()

    def run(self, rounds: int) -> "World":
        for _ in range(rounds):
            self.round()
        return self

    def global_model(self) -> nn.Module:
        model = network()
        model.load_state_dict(self.server.replica.state())
        return model


@pytest.fixture(scope="module")
def exact() -> World:
    return World(make_codec("fp32")).run(8)


@pytest.mark.parametrize("codec", LOSSY)
def test_a_batchnorm_model_trains_and_evaluates(codec: str, exact: World) -> None:
    world = World(make_codec(codec)).run(8)
    model = world.global_model()
    started, plain, reached = (loss_of(network()), loss_of(exact.global_model()), loss_of(model))
    assert plain < 0.2 * started
    assert reached < 0.4 * started
    assert float(model[1].running_var.min()) > 0
    assert int(model[1].num_batches_tracked) == 32  # a counter, of the client that has most


def test_kept_values_are_the_weighted_means_and_maxima_of_what_clients_have() -> None:
    initial = {
        "w": torch.zeros(4),
        "running_mean": torch.zeros(2, dtype=torch.float64),
        "count": torch.tensor([3, 5]),
        "flag": torch.tensor([False, False]),
    }
    server = Server(initial, make_codec("int8"))
    for number, examples in ((0, 1), (1, 3)):
        client = server.client(number)
        trained = {
            "w": torch.zeros(4),
            "running_mean": torch.tensor([1.0 + number, -8.0]),
            "count": torch.tensor([7 - number, 5 + number]),
            "flag": torch.tensor([number == 1, False]),
        }
        trained["running_mean"] = trained["running_mean"].double()
        server.receive(client.reply(trained, examples))
    server.close_round()
    state = server.replica.state()
    assert state["running_mean"].tolist() == [1.75, -8.0]
    assert state["count"].tolist() == [7, 6]
    assert state["flag"].tolist() == [True, False]
    late = server.client(5)
    assert equal(dict(late.receive(server.broadcast(0))), state)


@pytest.mark.parametrize("mode", ["post", "latent"])
def test_all_replicas_hold_equal_bits_whenever_they_come(mode: str) -> None:
    world = World(make_codec("int4"), ServerConfig(mode=mode))
    for _ in range(4):
        world.round()
        newcomer = Client(99, network(), make_codec("int4"), config=ServerConfig(mode=mode))
        state = newcomer.receive(world.server.broadcast(0))
        assert equal(dict(state), world.server.replica.state())
        assert newcomer.replica.digest == world.server.replica.digest
    assert loss_of(world.global_model()) < 0.5 * loss_of(network())


def test_a_federation_resumes_with_its_kept_tensors() -> None:
    whole = World(make_codec("int4-rotated")).run(5)
    killed = World(make_codec("int4-rotated")).run(3)
    again = World(make_codec("int4-rotated"))
    again.server.load_state_dict(killed.server.state_dict())
    again.clients = [again.server.client(i, 2) for i in range(CLIENTS)]
    again.run(2)
    assert equal(again.server.replica.state(), whole.server.replica.state())
    assert again.server.replica.digest == whole.server.replica.digest


def test_subspace_auto_keeps_them_over_its_switch() -> None:
    server = AutoServer(network(), AUTO)
    model = network()
    started = loss_of(model)
    for number in range(6):
        for i in range(CLIENTS):
            client = server.client(i)
            model.load_state_dict(dict(client.receive(server.broadcast(client.version))))
            latent = client.config.mode == "latent"
            optimizer: torch.optim.Optimizer = (
                LatentOptimizer(model, client.codec, torch.optim.SGD, lr=0.1)
                if latent
                else torch.optim.SGD(model.parameters(), lr=0.1)
            )
            train(model, optimizer, i, number)
            trained = optimizer if isinstance(optimizer, LatentOptimizer) else model
            server.receive(client.reply(trained, 32, buffers=model))
        server.close_round()
    assert server.fits == 1
    model.load_state_dict(server.replica.state())
    assert loss_of(model) < 0.5 * started
    assert int(model[1].num_batches_tracked) == 24
    again = AutoServer(network(), AUTO)
    again.load_state_dict(server.state_dict())
    assert equal(again.replica.state(), server.replica.state())
    assert again.replica.digest == server.replica.digest


def test_values_that_did_not_change_cost_nothing() -> None:
    initial = {"w": torch.zeros(4), "count": torch.arange(1000)}
    server = Server(initial, make_codec("fp32"))
    client = server.client(0)
    reply = client.reply({"w": torch.ones(4), "count": torch.arange(1000)}, 1)
    assert Reply.from_bytes(reply).values is None
    server.receive(reply)
    server.close_round()
    assert not any(kind == VALUES for kind, _ in Broadcast.from_bytes(server.broadcast(0)).parts)
    assert len(server.broadcast(0)) < 100


@pytest.mark.parametrize("codec", ["fp32", "int4", "rotsign"])
def test_a_plain_state_dict_is_split_by_what_batchnorm_calls_its_buffers(codec: str) -> None:
    made = Server(network().state_dict(), make_codec(codec))
    named = Server(network(), make_codec(codec))
    assert made.uplink.digest == named.uplink.digest
    assert set(made.replica.kept) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def test_buffers_of_a_module_are_kept_whatever_their_names() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))
            self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
            self.register_buffer("scratch", torch.zeros(9), persistent=False)

    parts = split(Odd())
    assert (list(parts.coded), list(parts.kept)) == (["weight"], ["mask"])
    server = Server(Odd(), make_codec("int4"))
    client = server.client(0)
    trained = Odd()
    nn.init.ones_(trained.weight)
    server.receive(client.reply(trained, 1))
    server.close_round()
    assert server.replica.state()["mask"].tolist() == [0.0, -torch.inf]


@pytest.mark.parametrize("what", ["running_var", "num_batches_tracked"])
def test_a_latent_reply_without_its_buffers_is_refused_with_the_way_out(what: str) -> None:
    model = network()
    client = Client(0, model, make_codec("fp32"), config=ServerConfig(mode="latent"))
    optimizer = LatentOptimizer(model, client.codec, torch.optim.SGD, lr=0.1)
    with pytest.raises(ConfigError, match=r"bit for bit: reply\(optimizer, examples, buffers="):
        client.reply(optimizer, 1)
    client.reply(optimizer, 1, buffers=model)
    incomplete = {n: t for n, t in model.state_dict().items() if what not in n}
    with pytest.raises(UpdateError, match=what):
        client.reply(optimizer, 1, buffers=incomplete)


def test_buffers_beside_a_model_are_sent_in_place_of_its_own() -> None:
    model, other = network(), network()
    for buffer in other.buffers():
        buffer.fill_(7)
    server = Server(model, make_codec("fp32"))
    server.receive(server.client(0).reply(model, 1, buffers=other))
    server.close_round()
    for name, _ in other.named_buffers():
        assert (server.replica.state()[name] == 7).all()


def test_a_reply_whose_values_are_not_finite_is_refused_on_both_sides() -> None:
    initial = network().state_dict()
    server = Server(initial, make_codec("int4"))
    client = server.client(0)
    bad = copy.deepcopy(initial)
    bad["1.running_var"][3] = torch.inf
    with pytest.raises(MalformedBodyError, match="running_var"):
        client.reply(bad, 1)
    good = Reply.from_bytes(client.reply({**initial, "1.running_var": torch.ones(24) * 2}, 1))
    kept = {**server.replica.kept, "1.running_var": bad["1.running_var"]}
    forged = Reply(0, 0, 1, good.payload, server.replica.pack_kept(kept))
    with pytest.raises(MalformedBodyError, match="running_var"):
        server.receive(forged.to_bytes())
    assert server.replies == ()


# -- rules ---------------------------------------------------------------------------------------


def of(rules: Any, codec: str = "int4") -> Server:
    return Server(network(), make_codec(codec), config=ServerConfig(rules=rules))


def test_the_first_rule_that_matches_decides_in_both_directions() -> None:
    server = of((("0.*", "fp32"), ("*.bias", "int8"), ("0.weight", "sign")))
    for codec in (server.uplink, server.downlink):
        assert isinstance(codec, PerTensor)
        by_name = {t.name: part for part in codec.parts for t in part.spec or ()}
        assert {n: str(by_name[n]).split("(")[0] for n in by_name} == {
            "0.weight": "Identity",
            "0.bias": "Identity",
            "1.weight": "BlockQuant",
            "1.bias": "BlockQuant",
            "3.weight": "BlockQuant",
            "3.bias": "BlockQuant",
        }
        assert by_name["1.bias"].config.to_dict()["bits"] == 8
        assert by_name["3.weight"].config.to_dict()["bits"] == 4


def test_tensors_of_a_lossless_rule_lose_nothing() -> None:
    world = World(make_codec("sign"), ServerConfig(rules=(("3.*", "fp32"),)))
    before = {n: t.clone() for n, t in world.server.replica.state().items()}
    world.round()
    mean = {n: sum(m.state_dict()[n].double() for m in world.models) / CLIENTS for n in before}
    after = world.server.replica.state()
    assert torch.allclose(after["3.weight"].double(), mean["3.weight"], rtol=0, atol=1e-6)
    assert not torch.allclose(after["0.weight"].double(), mean["0.weight"], rtol=0, atol=1e-3)


def test_rules_train_in_latent_mode_too() -> None:
    config = ServerConfig(mode="latent", rules=(("*.bias", "fp32"),))
    world = World(make_codec("int4"), config).run(6)
    assert loss_of(world.global_model()) < 0.5 * loss_of(network())


def test_a_rule_that_would_lose_an_integer_is_refused_at_once_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"num_batches_tracked' is torch.int64.*use 'fp32'"):
        of((("*num_batches*", "int4"),))
    assert of((("*num_batches*", "fp32"),)).replica.kept


@pytest.mark.parametrize("rules", [(("nothing.*", "fp32"),), (("0.weight.", "int8"),)])
def test_a_rule_that_matches_nothing_is_refused(rules: Any) -> None:
    with pytest.raises(ConfigError, match=r"matches no tensor; there are 0\.weight"):
        of(rules)


@pytest.mark.parametrize("rules", [("*.bias",), (("*.bias",),), {"*.bias": "fp32"}, ((1, "fp32"),)])
def test_rules_that_are_no_pairs_are_refused(rules: Any) -> None:
    with pytest.raises(ConfigError, match=r"rules as \(pattern, codec\) pairs"):
        ServerConfig(rules=rules)


def test_an_unknown_codec_in_a_rule_is_named() -> None:
    with pytest.raises(ConfigError, match="'int3'"):
        of((("*", "int3"),))


def test_a_checkpoint_on_disk_has_the_kept_tensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    world = World(make_codec("int4")).run(2)
    save_file(world.server.state_dict(), tmp_path / "s.safetensors")
    again = Server(network(), make_codec("int4"))
    again.load_state_dict(load_file(tmp_path / "s.safetensors"))
    assert equal(again.replica.state(), world.server.replica.state())
    broken = world.server.state_dict()
    del broken["kept"]
    with pytest.raises(ConfigError, match="kept tensors are missing"):
        again.load_state_dict(broken)


def test_names_and_order_of_a_state_are_those_that_were_given() -> None:
    server = Server(network().state_dict(), make_codec("int4"))
    assert list(server.replica.state()) == list(network().state_dict())
    assert UpdateSpec.of(server.replica.state()) == UpdateSpec.of(network().state_dict())
