"""Laws of the Flower adapter, over a grid whose messages really become bytes."""

import logging
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedMedian,
)
from hub_helpers import REPO, reachable_hub
from integrations.flower_loopback import LoopbackGrid
from loopback_hub import TOKEN

import gradcodec as gc
from gradcodec import wire
from gradcodec.errors import ConfigError, GradcodecError, UpdateError, WireError
from gradcodec.integrations.flower import (
    CodecFedAvg,
    CodecGrid,
    CodecStrategy,
    CompressMod,
    container,
    to_record,
)
from gradcodec.integrations.flower.mod import VERSION
from gradcodec.integrations.flower.node import STATE
from gradcodec.packers.rotsign import RotatedSignConfig
from gradcodec.tgap import SecondMoments
from gradcodec.types import UpdateSpec

ROUNDS = 4


def model() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "frozen": rng.normal(size=(64, 64)).astype(np.float32),
        "lora_A": rng.normal(size=(8, 96)).astype(np.float32),
        "lora_B": np.zeros((96, 8), np.float32),
        "count": np.array([3], np.int64),
    }


def record(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in arrays.items()})


def train(message: Message, context: Context) -> Message:
    """Moves the adapter towards a point of this node; counts; leaves the rest."""
    arrays = {n: a.numpy().copy() for n, a in message.content["arrays"].items()}
    rng = np.random.default_rng(context.node_id)
    for name in ("lora_A", "lora_B"):
        goal = rng.normal(size=arrays[name].shape).astype(np.float32)
        arrays[name] += 0.3 * (goal - arrays[name])
    arrays["count"] += 1
    content = {"arrays": record(arrays), "metrics": MetricRecord({"num-examples": 10})}
    return Message(RecordDict(content), reply_to=message)


def evaluate(message: Message, context: Context) -> Message:
    norm = float(sum(np.abs(a.numpy()).sum() for a in message.content["arrays"].values()))
    metrics = MetricRecord({"num-examples": 10, "norm": norm})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def app(mods: list[Any]) -> Callable[[], ClientApp]:
    def make() -> ClientApp:
        made = ClientApp(mods=mods)
        made.train()(train)
        made.evaluate()(evaluate)
        return made

    return make


WITH, WITHOUT = app([CompressMod()]), app([])


def run(
    grid: LoopbackGrid,
    codec: Any = None,
    strategy: Any = FedAvg,
    rounds: int = ROUNDS,
    evaluated: float = 1.0,
    **options: Any,
) -> list[dict[str, np.ndarray]]:
    """The global model after each round."""
    seen: list[dict[str, np.ndarray]] = []

    def watch(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append({n: a.numpy() for n, a in arrays.items()})
        return MetricRecord()

    wrapped = grid if codec is None else CodecGrid(grid, codec, **options)
    strategy(fraction_evaluate=evaluated).start(
        grid=wrapped, initial_arrays=record(model()), num_rounds=rounds, evaluate_fn=watch
    )
    return seen


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert list(a) == list(b)
    assert all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape for n in a)
    error = sum(float(np.square(a[n].astype(float) - b[n]).sum()) for n in a)
    return error / sum(float(np.square(a[n].astype(float)).sum()) for n in a)


def test_nothing_is_lost_without_a_lossy_codec() -> None:
    plain = run(LoopbackGrid(WITHOUT, 3))
    for coded in (
        run(LoopbackGrid(WITH, 3), "fp32", downlink="fp32"),
        run(LoopbackGrid(WITH, 3)),  # the mod alone changes nothing
        run(LoopbackGrid(WITHOUT, 3), "int4", downlink="fp32"),  # nor does the grid alone
    ):
        assert all(distance(a, b) < 1e-12 for a, b in zip(plain, coded, strict=True))


@pytest.mark.parametrize("per_node", [False, True])
@pytest.mark.parametrize("strategy", [FedAvg, FedMedian])
def test_int4_both_ways_ends_near_and_is_many_times_smaller(strategy: Any, per_node: bool) -> None:
    there, here = LoopbackGrid(WITHOUT, 3), LoopbackGrid(WITH, 3)
    plain, coded = run(there, strategy=strategy), run(here, "int4", strategy, per_node=per_node)
    assert 0 < distance(plain[-1], coded[-1]) < 2e-3
    after = 6  # the first two messages to each node hold the whole model or follow it
    up = [sum(row["up"] for row in grid.log[after:]) for grid in (there, here)]
    down = [sum(row["down"] for row in grid.log[after:]) for grid in (there, here)]
    assert up[0] > 6 * up[1]
    assert down[0] > 8 * down[1]
    assert max(row["objects"] for row in here.log) < max(row["objects"] for row in there.log)


def test_a_tensor_that_does_not_change_costs_nothing() -> None:
    small = run_bytes({"frozen": 0.0})
    large = run_bytes({"frozen": 1.0})
    assert large - small > 64 * 64 / 2


class Half(torch.nn.Module):
    """A model in bf16: a frozen base and an adapter."""

    def __init__(self) -> None:
        super().__init__()
        for name, values in model().items():
            at = torch.tensor(values).to(torch.bfloat16 if values.dtype == np.float32 else None)
            self.register_buffer(name, at)


def train_half(message: Message, context: Context) -> Message:
    """``train`` as one writes it for a module in bf16."""
    module = Half()
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())
    rng = np.random.default_rng(context.node_id)
    for name in ("lora_A", "lora_B"):
        tensor = getattr(module, name)
        goal = torch.tensor(rng.normal(size=tensor.shape))
        tensor += (0.3 * (goal - tensor)).bfloat16()
    metrics = MetricRecord({"num-examples": 10})
    content = {"arrays": to_record(module.state_dict()), "metrics": metrics}
    return Message(RecordDict(content), reply_to=message)


def run_half(codec: bool) -> tuple[dict[str, np.ndarray], LoopbackGrid]:
    def make() -> ClientApp:
        made = ClientApp(mods=[CompressMod()] if codec else [])
        made.train()(train_half)
        return made

    grid = LoopbackGrid(make, 3)
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=CodecGrid(grid, "int4") if codec else grid,
        initial_arrays=to_record(Half().state_dict()),
        num_rounds=ROUNDS,
    )
    return {name: array.numpy() for name, array in result.arrays.items()}, grid


def test_a_bf16_model_is_coded_from_all_its_values_and_what_is_frozen_costs_nothing() -> None:
    (plain, there), (coded, here) = run_half(False), run_half(True)
    assert 0 < distance(plain, coded) < 2e-3
    frozen = Half().frozen.float().numpy()
    np.testing.assert_allclose(coded["frozen"], frozen, rtol=2e-7)  # FedAvg's averages round
    adapter = sum(coded[name].size for name in ("lora_A", "lora_B"))
    up = here.log[-1]["up"]
    assert adapter / 2 < up < 64 * 64 / 2  # four bits a value; the frozen tensor alone has more
    assert there.log[-1]["up"] > 10 * up


def test_a_dtype_that_numpy_lacks_is_refused() -> None:
    with pytest.raises(UpdateError, match="numpy or bf16"):
        to_record({"w": torch.zeros(2, dtype=torch.float8_e4m3fn)})


def private(kind: str, mods: Sequence[Any] = (), **options: Any) -> tuple[Any, Sequence[Any]]:
    """One of Flower's wrappers for privacy, with hardly any noise, and its mods."""
    wrap = getattr(flower, f"DifferentialPrivacy{kind}Clipping")
    return lambda **o: wrap(FedAvg(**o), 1e-6, num_sampled_clients=NODES, **options), mods


NODES = 5
STRATEGIES: dict[str, tuple[Any, Sequence[Any]]] = {
    "half": (partial(FedAvg, fraction_train=0.6), ()),
    "prox": (partial(flower.FedProx, proximal_mu=0.1), ()),
    "adam": (FedAdam, ()),
    "yogi": (flower.FedYogi, ()),
    "adagrad": (flower.FedAdagrad, ()),
    "momentum": (partial(flower.FedAvgM, server_momentum=0.5), ()),
    "trimmed": (flower.FedTrimmedAvg, ()),
    "krum": (partial(flower.MultiKrum, num_malicious_nodes=1, num_nodes_to_select=2), ()),
    "bulyan": (partial(flower.Bulyan, num_malicious_nodes=0), ()),
    "fair": (partial(flower.QFedAvg, client_learning_rate=0.1, q=0.1), ()),
    "dp-server": private("ServerSideFixed", clipping_norm=5.0),
    "dp-client": private("ClientSideFixed", [fixedclipping_mod], clipping_norm=5.0),
    "dp-adaptive": private("ClientSideAdaptive", [adaptiveclipping_mod]),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_goes_as_without_codec_if_none_loses_anything(name: str) -> None:
    strategy, mods = STRATEGIES[name]

    def floats(message: Message, context: Context) -> Message:
        """Flower's wrappers for privacy do not take integers."""
        reply = train(message, context)
        arrays = {n: a.numpy() for n, a in reply.content["arrays"].items()}
        metrics = MetricRecord({"num-examples": 10, "train_loss": 1.0})
        trained = record({**arrays, "count": arrays["count"].astype(np.float32)})
        return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)

    def trained(codec: bool) -> dict[str, np.ndarray]:
        def make() -> ClientApp:
            made = ClientApp(mods=[*([CompressMod()] if codec else []), *mods])
            made.train()(floats)
            made.evaluate()(evaluate)
            return made

        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - what Flower samples nodes and noise with
        grid: Any = LoopbackGrid(make, NODES)
        grid = CodecGrid(grid, "fp32", downlink="fp32") if codec else grid
        start = {**model(), "count": np.array([3], np.float32)}
        result = strategy(fraction_evaluate=0.5).start(grid, record(start), num_rounds=3)
        return {n: a.numpy() for n, a in result.arrays.items()}

    plain, coded = trained(False), trained(True)
    assert np.abs(plain["lora_B"]).max() > 1e-3
    for array, expected in zip(coded.values(), plain.values(), strict=True):
        assert np.abs(array - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("nodes", [2, 3])
def test_a_frozen_tensor_costs_nothing_on_the_way_down_though_averages_of_it_round(
    nodes: int,
) -> None:
    grid = LoopbackGrid(WITH, nodes)
    after = run(grid, "int4", evaluated=0.0)
    adapters = gc.make_codec("int4").nbytes(spec_of("lora_A", "lora_B"))
    assert max(row["down"] for row in grid.log[nodes:]) < adapters + 1300  # headers of Flower's
    assert np.allclose(after[-1]["frozen"], after[0]["frozen"], rtol=1e-6, atol=0)


def spec_of(*names: str) -> UpdateSpec:
    return UpdateSpec.of({n: torch.from_numpy(model()[n]) for n in names})


def test_what_coding_loses_of_the_model_is_no_update_to_the_strategy() -> None:
    """Momentum, adaptive rates and clipping would take it for one."""

    def idle(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)

    grid = LoopbackGrid(app_of(idle), 1)
    codecs = CodecGrid(grid, "int4", downlink="sign")
    for factor in (1, 2, 3):
        sent = record({n: a * np.array(factor, a.dtype) for n, a in model().items()})
        (reply,) = codecs.send_and_receive(messages(sent, [100]))
        assert dict(reply.content["arrays"].items()) == dict(sent.items())
    assert max(row["down"] for row in grid.log[1:]) < 64 * 64 * 4  # coded, with loss


def app_of(train: Callable[[Message, Context], Message]) -> Callable[[], ClientApp]:
    """Apps with the mod that train so."""

    def make() -> ClientApp:
        made = ClientApp(mods=[CompressMod()])
        made.train()(train)
        return made

    return make


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_lists_of_numpy_arrays_of_any_shape_arrive_as_what_they_were(dtype: Any) -> None:
    """As Keras and scikit-learn give them: no names, scalars, empty ones, counters."""
    rng = np.random.default_rng(0)
    given = [
        rng.normal(size=(40, 8)).astype(dtype),
        np.asfortranarray(rng.normal(size=(8, 6)).astype(dtype)),
        np.array(1.5, dtype),
        np.zeros((0, 3), dtype),
        np.array([True, False]),
        np.arange(4),
    ]

    def step(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"].to_numpy_ndarrays()
        moved = [a + a.dtype.type(0.5) if i < 4 else a for i, a in enumerate(arrays)]
        metrics = MetricRecord({"num-examples": 1})
        content = {"arrays": ArrayRecord([np.asarray(a) for a in moved]), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    strategy = FedAvg(fraction_evaluate=0.0)
    codecs = CodecGrid(LoopbackGrid(app_of(step), 2), "int8", downlink="int8")
    after = strategy.start(codecs, ArrayRecord(given), num_rounds=3).arrays.to_numpy_ndarrays()
    for before, array in zip(given, after, strict=True):
        assert array.shape == before.shape
        if before.dtype.kind == "f":
            assert np.abs(array - before - 1.5).max(initial=0) < 0.02
        else:  # which FedAvg makes float64
            assert np.array_equal(array, before)


def test_counters_stay_exact_and_out_of_the_weights_way_though_flower_averages_them() -> None:
    """As BatchNorm's ``num_batches_tracked``, which FedAvg turns into float64 after a round."""

    def counting(message: Message, context: Context) -> Message:
        reply = train(message, context)
        arrays = {n: a.numpy() for n, a in reply.content["arrays"].items()}
        arrays["count"] = arrays["count"] + context.node_id * 10
        reply.content["arrays"] = record(arrays)
        return reply

    grid = LoopbackGrid(app_of(counting), 2)
    plain = run(LoopbackGrid(app_of(counting), 2), evaluated=0.0)
    coded = run(grid, "int4", evaluated=0.0)
    assert plain[-1]["count"].tolist() == coded[-1]["count"].tolist() == [3 + ROUNDS * 1006]
    assert coded[-1]["count"].dtype == np.float64
    without = run(LoopbackGrid(WITH, 2), "int4", evaluated=0.0)
    assert np.array_equal(coded[-1]["lora_B"], without[-1]["lora_B"])
    assert max(row["down"] for row in grid.log[2:]) < 64 * 64 * 4  # the model comes once


def test_arrays_without_floats_pass_as_they_are_and_may_change_their_shape() -> None:
    """A forest grows, as in Flower's strategies for XGBoost."""

    def grow(message: Message, context: Context) -> Message:
        trees = message.content["arrays"]["0"].numpy()
        content = {"arrays": ArrayRecord([np.append(trees, trees[-1:] + 1)])}
        return Message(RecordDict(content), reply_to=message)

    codecs = CodecGrid(LoopbackGrid(app_of(grow), 1), "int4")
    sent = ArrayRecord([np.zeros(1, np.uint8)])
    for _ in range(3):
        (reply,) = codecs.send_and_receive(messages(sent, [100]))
        sent = reply.content["arrays"]
    assert sent["0"].numpy().tolist() == [0, 1, 2, 3]


def test_of_two_records_of_a_reply_the_one_that_came_is_coded() -> None:
    """Control variates have the model's names, and are not relative to it."""
    control = {n: np.full_like(a, 7) for n, a in model().items()}

    def two(message: Message, context: Context) -> Message:
        reply = train(message, context)
        both = {"control": record(control), **reply.content}
        return Message(RecordDict(both), reply_to=message)

    coded, plain = (CodecGrid(LoopbackGrid(a, 1), "int4") for a in (app_of(two), WITH))
    sent = record(model())
    for _ in range(3):
        (reply,) = coded.send_and_receive(messages(sent, [100]))
        (alone,) = plain.send_and_receive(messages(sent, [100]))
        found = {n: a.numpy() for n, a in reply.content["control"].items()}
        assert all(np.array_equal(found[n], control[n]) for n in control)
        assert dict(reply.content["arrays"].items()) == dict(alone.content["arrays"].items())
        sent = reply.content["arrays"]


def test_it_is_said_once_that_nothing_is_compressed(caplog: pytest.LogCaptureFixture) -> None:
    codecs = CodecGrid(LoopbackGrid(WITHOUT, 3), "int4")
    two = RecordDict({"arrays": record(model()), "control": record(model())})
    for _ in range(2):
        list(codecs.send_and_receive(messages(record(model()), [100, 101])))
        list(codecs.send_and_receive([Message(two, dst_node_id=102, message_type="train")]))
    told = [r.getMessage() for r in caplog.records if r.name.startswith("gradcodec")]
    assert len(told) == 2
    assert "node 100" in told[0]
    assert "has no CompressMod" in told[0]
    assert "more than one ArrayRecord" in told[1]


def test_a_second_training_in_one_run_begins_without_what_the_first_one_lost() -> None:
    used, options = LoopbackGrid(WITH, 2), {"downlink": "fp32", "error_feedback": True}
    run(used, "sign", **options)
    again, fresh = run(used, "sign", **options), run(LoopbackGrid(WITH, 2), "sign", **options)
    assert all(np.array_equal(again[-1][n], fresh[-1][n]) for n in fresh[-1])


def test_the_wrapper_has_the_bits_of_the_grid() -> None:
    def wrapped(**options: Any) -> CodecStrategy:
        return CodecStrategy(FedAdam(**options), "int4", error_feedback=False)

    there = run(LoopbackGrid(WITH, 2), strategy=wrapped)
    here = run(LoopbackGrid(WITH, 2), "int4", FedAdam, error_feedback=False)
    assert all(np.array_equal(there[-1][n], here[-1][n]) for n in here[-1])
    assert distance(here[-1], run(LoopbackGrid(WITH, 2), strategy=FedAdam)[-1]) > 0


def test_layers_that_would_not_compress_or_would_do_it_twice_are_refused() -> None:
    grid = LoopbackGrid(WITH, 2)
    inside = DifferentialPrivacyServerSideFixedClipping(
        CodecStrategy(FedAvg(), "int4"),
        noise_multiplier=0.1,
        clipping_norm=1.0,
        num_sampled_clients=2,
    )
    with pytest.raises(ConfigError, match="CodecStrategy around all other strategies"):
        inside.start(grid, record(model()), num_rounds=1)
    with pytest.raises(ConfigError, match=r"Flower's CodecFedAvg\('subspace:auto'\)"):
        CodecGrid(grid, "subspace:auto")
    with pytest.raises(ConfigError, match="got a CodecGrid"):
        CodecGrid(CodecGrid(grid, "int4"), "int4")
    with pytest.raises(ConfigError, match="got a CodecGrid"):
        CodecFedAvg("int4").start(CodecGrid(grid, "int4"), record(model()), num_rounds=1)


def run_bytes(moved: dict[str, float]) -> int:
    """Bytes of the last reply if these tensors move as well."""

    def also(message: Message, context: Context) -> Message:
        reply = train(message, context)
        arrays = {n: a.numpy() for n, a in reply.content["arrays"].items()}
        for name, by in moved.items():
            arrays[name] = arrays[name] + np.float32(by) * np.float32(context.node_id)
        reply.content["arrays"] = record(arrays)
        return reply

    grid = LoopbackGrid(app_of(also), 2)
    run(grid, "int4", evaluated=0.0)
    return grid.log[-1]["up"]


def test_a_node_without_the_mod_takes_part_plainly() -> None:
    grid = LoopbackGrid(WITH, 3)
    grid.apps[101] = WITHOUT
    mixed = run(grid, "fp32", downlink="fp32")
    assert distance(run(LoopbackGrid(WITHOUT, 3))[-1], mixed[-1]) < 1e-12
    up = {node: [r["up"] for r in grid.log if r["node"] == node] for node in (100, 101)}
    assert up[101][-2] > up[100][-2]


@pytest.mark.parametrize("feedback", [True, False, None])
def test_feedback_is_kept_in_the_nodes_state(feedback: bool | None) -> None:
    grid = LoopbackGrid(WITH, 2)  # FedAvg waits for two nodes
    run(grid, "sign", downlink="fp32", error_feedback=feedback)
    parts = container.unpacked(grid.contexts[100].state.array_records[STATE])
    assert bool(parts["lost"]) == (feedback is not False)


def test_a_tensor_that_rests_after_it_has_moved_gets_what_coding_lost_of_it() -> None:
    sent = np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)

    def once(message: Message, context: Context) -> Message:
        arrays = {n: a.numpy().copy() for n, a in message.content["arrays"].items()}
        arrays["w"] += sent if message.content["config"]["lr"] else 0
        arrays["other"] += 1
        return Message(RecordDict({"arrays": record(arrays)}), reply_to=message)

    codecs = CodecGrid(LoopbackGrid(app_of(once), 1), "sign", downlink="fp32")
    arrays = record({"w": np.zeros((16, 16), np.float32), "other": np.zeros(3, np.float32)})
    for number in range(20):
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": float(number == 1)})})
        (reply,) = codecs.send_and_receive(
            [Message(content, dst_node_id=100, message_type="train")]
        )
        arrays = reply.content["arrays"]
    assert np.linalg.norm(arrays["w"].numpy() - sent) < 0.2 * np.linalg.norm(sent)


@pytest.mark.parametrize("per_node", [False, True])
def test_a_lost_reply_and_missed_rounds_are_made_up_for(per_node: bool) -> None:
    grid = LoopbackGrid(WITH, 3)
    codecs = CodecGrid(grid, "fp32", downlink="int8", per_node=per_node)
    sent = record(model())
    for number in range(6):
        nodes = [100, 101] if number in (2, 3) else [100, 101, 102]
        if number == 1:
            grid.lost.add(102)
        replies = codecs.send_and_receive(messages(sent, nodes))
        assert len(replies) == len(nodes) - (number == 1)
        assert not any(r.has_error() for r in replies)
        sent = next(iter(replies)).content["arrays"]
    # Only increments after the first message: none is as large as the frozen tensor.
    assert max(row["down"] for row in grid.log[3:]) < 64 * 64 * 4


def walk(per_node: bool) -> tuple[LoopbackGrid, float]:
    """A model that moves in every round; node 101 takes part in the first and the last.

    Returns:
        The grid, and the relative squared error of what node 101 holds of the movement.
    """
    seen: dict[int, np.ndarray] = {}

    def once(message: Message, context: Context) -> Message:
        arrays = message.content["arrays"]
        seen[context.node_id] = arrays["w"].numpy().copy()
        return Message(RecordDict({"arrays": arrays}), reply_to=message)

    grid = LoopbackGrid(app_of(once), 2)
    codecs = CodecGrid(grid, "int4", downlink="int4", per_node=per_node)
    rng = np.random.default_rng(0)
    begin = w = rng.normal(size=4096).astype(np.float32)
    for number in range(7):
        nodes = [100, 101] if number in (0, 6) else [100]
        codecs.send_and_receive(messages(record({"w": w}), nodes))
        last, w = w, w + rng.normal(size=4096).astype(np.float32)
    error = np.square(seen[101] - last).sum() / np.square(last - begin).sum()
    return grid, float(error)


def test_a_difference_of_a_nodes_own_costs_the_same_however_many_rounds_it_missed() -> None:
    (shared, _), (own, error) = walk(False), walk(True)
    one = own.log[-2]["down"]  # of node 100, which missed none
    assert own.log[-1]["node"] == shared.log[-1]["node"] == 101
    assert own.log[-1]["down"] < 1.1 * one
    assert shared.log[-1]["down"] > 4 * one
    assert 0.004 < error < 0.02  # of 4 bits, over six rounds at once


def test_per_node_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="per_node"):
        CodecGrid(LoopbackGrid(WITH, 1), "int4", per_node="yes")  # type: ignore[arg-type]


def test_a_node_that_lost_its_state_is_sent_the_whole_model_again() -> None:
    grid = LoopbackGrid(WITH, 2)
    codecs = CodecGrid(grid, "int4")
    sent = record(model())
    outcomes = []
    for number in range(5):
        if number == 2:
            grid.forget(101)
        replies = list(codecs.send_and_receive(messages(sent, [100, 101])))
        outcomes.append([r.has_error() for r in replies])
        sent = replies[0].content["arrays"]
    assert outcomes == [[False, False]] * 2 + [[False, True]] + [[False, False]] * 2


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "another version", "another size"])
def test_a_damaged_reply_costs_that_reply(how: str, caplog: pytest.LogCaptureFixture) -> None:
    def damage(node: int, reply: Message) -> None:
        if node != 101 or reply.has_error() or len(grid.log) < 2:
            return
        parts = container.unpacked(reply.content.array_records["arrays"])
        data = bytearray(reply.content.array_records["arrays"][container.KEY].data)
        if how == "another version":
            parts["base"] = b"x" * 8
            data = bytearray(container.packed(parts)[container.KEY].data)
        if how == "another size":
            del parts["coded"]
            data = bytearray(container.packed(parts)[container.KEY].data)
        if how == "flipped":
            data[len(data) // 2] ^= 1
        data = {"cut": data[:-3], "empty": bytearray()}.get(how, data)
        array = Array("uint8", (len(data),), container.STYPE, bytes(data))
        reply.content["arrays"] = ArrayRecord({container.KEY: array})

    grid = LoopbackGrid(WITH, 2)
    grid.damage = damage
    codecs = CodecGrid(grid, "int4")
    sent = record(model())
    with caplog.at_level(logging.WARNING):
        for number in range(3):
            replies = list(codecs.send_and_receive(messages(sent, [100, 101])))
            assert [r.has_error() for r in replies] == [False, number > 0]
            sent = replies[0].content["arrays"]
    assert "dropped the reply of node 101" in caplog.text
    assert np.isfinite(sent["lora_A"].numpy()).all()


def older(parts: dict[str, bytes], how: str) -> ArrayRecord:
    """What a node with another version of gradcodec would have sent."""
    if how == "container":
        data = container.packed(parts)[container.KEY].data
        return ArrayRecord({container.KEY: Array("uint8", (len(data),), "gradcodec.0", data)})
    name, blob = next((n, b) for n, b in parts.items() if b[:2] == wire.MAGIC)
    return container.packed({**parts, name: blob[:2] + b"\0" + blob[3:]})  # its version


@pytest.mark.parametrize("how", ["container", "payload"])
def test_a_node_of_another_wire_version_is_left_out_and_the_run_goes_on(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    def damage(node: int, reply: Message) -> None:
        if node == 102 and not reply.has_error() and "arrays" in reply.content:
            parts = container.unpacked(reply.content.array_records["arrays"])
            reply.content["arrays"] = older(parts, how)

    grid = LoopbackGrid(WITH, 3)
    grid.damage = damage
    with caplog.at_level(logging.WARNING):
        after = run(grid, "int4", evaluated=0.0)
    assert len(after) == ROUNDS + 1
    assert np.abs(after[-1]["lora_B"]).max() > 0.1
    told = [r.message for r in caplog.records if "dropped the reply of node 102" in r.message]
    assert len(told) == ROUNDS
    assert all("UnsupportedVersionError" in text for text in told)


def test_a_node_of_an_older_version_refuses_a_newer_servers_message() -> None:
    grid = LoopbackGrid(WITH, 1)
    data = container.packed({"version": b"x" * 8})[container.KEY].data
    newer = ArrayRecord({container.KEY: Array("uint8", (len(data),), "gradcodec.2", data)})
    codecs = CodecGrid(grid, "int4")
    (message,) = messages(record(model()), [100])
    ((coded, _),) = codecs._encoded([message])
    coded.content["arrays"] = newer
    (reply,) = grid.send_and_receive([coded])
    assert "different versions of gradcodec" in reply.error.reason


def test_a_reply_after_its_round_is_decoded_as_what_it_was_and_costs_no_later_one() -> None:
    grid = LoopbackGrid(WITH, 2)
    codecs = CodecGrid(grid, "fp32", downlink="int8")
    sent = record(model())
    for _ in range(2):
        sent = next(iter(codecs.send_and_receive(messages(sent, [100, 101])))).content["arrays"]
    on_time, late = codecs.push_messages(messages(sent, [100, 101]))
    (first,) = codecs.pull_messages([on_time])
    then = list(codecs.send_and_receive(messages(first.content["arrays"], [100])))
    (reply,) = codecs.pull_messages([late])  # node 101 was slow
    assert not reply.has_error()
    goal = np.random.default_rng(101).normal(size=(8, 96)).astype(np.float32)
    base = goal + (reply.content["arrays"]["lora_A"].numpy() - goal) / 0.7  # inverse of `train`
    assert np.abs(base - sent["lora_A"].numpy()).max() < 0.05  # of its own round, not of the next
    after = list(codecs.send_and_receive(messages(then[0].content["arrays"], [100, 101])))
    assert [r.has_error() for r in after] == [False, False]
    assert max(row["down"] for row in grid.log[-2:]) < 64 * 64 * 4  # increments, not the model


def test_training_that_diverges_costs_that_nodes_reply() -> None:
    def diverged(message: Message, context: Context) -> Message:
        reply = train(message, context)
        arrays = {n: a.numpy() for n, a in reply.content["arrays"].items()}
        arrays["lora_A"] = arrays["lora_A"] * np.float32("nan")
        reply.content["arrays"] = record(arrays)
        return reply

    for codec in ("int4", "fp32"):
        grid = LoopbackGrid(WITH, 2)
        grid.apps[101] = app_of(diverged)
        replies = CodecGrid(grid, codec).send_and_receive(messages(record(model()), [100, 101]))
        assert [r.has_error() for r in replies] == [False, True]


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_fitted_codec_goes_up(where: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    update = {n: torch.randn(v.shape) for n, v in model().items() if n.startswith("lora")}
    recorded = SecondMoments(UpdateSpec.of(update), gc.SubspaceConfig(ratio=2))
    for _ in range(8):
        recorded.add({n: torch.randn(t.shape) for n, t in update.items()})
    fitted = gc.Chain(gc.fit_subspace(recorded), gc.BlockQuant(gc.BlockQuantConfig(8)))
    options: dict[str, Any] = {"downlink": "int8", "rules": [("frozen", "fp32")]}
    with pytest.raises(GradcodecError, match="no such codec or folder"):
        CodecGrid(LoopbackGrid(WITH, 1), "no such codec or folder")
    with reachable_hub(tmp_path, monkeypatch):
        name = REPO if where == "hub" else str(tmp_path / "codec")
        if where == "hub":
            fitted.push_to_hub(name, token=TOKEN)
        else:
            fitted.save_pretrained(name)
        after = run(LoopbackGrid(WITH, 2), name, **options)
    assert np.abs(after[-1]["lora_B"]).max() > 0.1
    assert np.isfinite(after[-1]["lora_A"]).all()


@pytest.mark.parametrize("way", ["codec", "downlink"])
def test_a_codec_that_was_fitted_on_other_tensors_is_refused_with_the_first_model(way: str) -> None:
    chosen = {"codec": "int8", "downlink": "int8", way: "stdlib-llama-lora-r8-32x"}
    with pytest.raises(UpdateError, match="expected the codec's 48 tensors, got 3"):
        run(LoopbackGrid(WITH, 2), **chosen)


@pytest.mark.parametrize("downlink", ["int2-unbiased", RotatedSignConfig(kept=64)])
def test_a_downlink_whose_errors_add_up_is_refused(downlink: Any) -> None:
    with pytest.raises(ConfigError, match="error is smaller than its input"):
        CodecGrid(LoopbackGrid(WITH, 1), "int4", downlink)


def test_a_tensor_of_another_shape_costs_that_reply_and_is_named() -> None:
    """One row of a matrix would otherwise be repeated to fit."""

    def one_row(message: Message, context: Context) -> Message:
        reply = train(message, context)
        arrays = {n: a.numpy() for n, a in reply.content["arrays"].items()}
        reply.content["arrays"] = record({**arrays, "lora_A": arrays["lora_A"][:1]})
        return reply

    grid = CodecGrid(LoopbackGrid(app_of(one_row), 1), "int4")
    content = RecordDict({"arrays": record(model()), "config": ConfigRecord()})
    (reply,) = grid.send_and_receive([Message(content, message_type="train", dst_node_id=100)])
    assert reply.has_error()
    assert "'lora_A': expected the shape (8, 96) of the model that came, got (1, 96)" in str(
        reply.error.reason
    )


def test_a_rule_that_matches_no_tensor_is_refused_with_the_first_model() -> None:
    with pytest.raises(ConfigError, match=r"rule 'loar_\*' matches no tensor; there are frozen"):
        run(LoopbackGrid(WITH, 2), "int4", rules=[("loar_*", "fp32")])


def test_the_state_of_another_run_or_choice_is_not_used() -> None:
    grid = LoopbackGrid(WITH, 2)
    run(grid, "int4", evaluated=0.0)
    held = bytes(grid.contexts[100].state.array_records[STATE][container.KEY].data)
    grid.log.clear()
    run(grid, "int8", evaluated=0.0)  # another server: the whole model comes first
    assert grid.log[0]["down"] > 64 * 64 * 4
    assert grid.contexts[100].state.array_records[STATE][container.KEY].data != held


@pytest.mark.parametrize("cut", [0, 3, 10, 40])
def test_a_container_is_read_whole_or_refused(cut: int) -> None:
    parts = {"a": b"123", "b/c": b""}
    whole = container.packed(parts)
    assert container.unpacked(whole) == parts
    data = whole[container.KEY].data[:cut]
    if cut != 4 and data != whole[container.KEY].data:
        with pytest.raises(WireError):
            container.unpacked(
                ArrayRecord({container.KEY: Array("uint8", (cut,), container.STYPE, data)})
            )


def messages(sent: ArrayRecord, nodes: list[int]) -> list[Message]:
    """What a strategy sends: one content for all nodes."""
    content = RecordDict({"arrays": sent, "config": ConfigRecord({"lr": 0.1})})
    return [Message(content, dst_node_id=node, message_type="train") for node in nodes]


def test_the_app_does_not_see_what_server_and_mod_say_to_each_other() -> None:
    seen: list[set[str]] = []

    def spying(message: Message, context: Context) -> Message:
        seen.append(set(message.content["config"]))
        return train(message, context)

    codecs = CodecGrid(LoopbackGrid(app_of(spying), 2), "int4")
    list(codecs.send_and_receive(messages(record(model()), [100, 101])))
    assert seen == [{"lr"}, {"lr"}]


def test_the_strategys_own_content_is_not_changed() -> None:
    grid = LoopbackGrid(WITH, 2)
    codecs = CodecGrid(grid, "int4")
    sent = record(model())
    out = messages(sent, [100, 101])
    content = out[0].content
    list(codecs.send_and_receive(out))
    assert set(content["config"]) == {"lr"}
    assert VERSION not in content["config"]
    assert content["arrays"] is sent
