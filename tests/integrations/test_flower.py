"""Laws of the Flower adapter, over a grid whose messages really become bytes."""

import logging
from collections.abc import Callable
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
from flwr.serverapp.strategy import FedAvg, FedMedian
from integrations.flower_loopback import LoopbackGrid

import gradcodec as gc
from gradcodec import wire
from gradcodec.errors import ConfigError, GradcodecError, WireError
from gradcodec.integrations.flower import CodecGrid, CompressMod, container
from gradcodec.integrations.flower.mod import STATE, VERSION
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


@pytest.mark.parametrize("strategy", [FedAvg, FedMedian])
def test_int4_both_ways_ends_near_and_is_many_times_smaller(strategy: Any) -> None:
    there, here = LoopbackGrid(WITHOUT, 3), LoopbackGrid(WITH, 3)
    plain, coded = run(there, strategy=strategy), run(here, "int4", strategy)
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


def run_bytes(moved: dict[str, float]) -> int:
    """Bytes of the last reply if these tensors move as well."""

    def also(message: Message, context: Context) -> Message:
        reply = train(message, context)
        arrays = {n: a.numpy() for n, a in reply.content["arrays"].items()}
        for name, by in moved.items():
            arrays[name] = arrays[name] + np.float32(by) * np.float32(context.node_id)
        reply.content["arrays"] = record(arrays)
        return reply

    def make() -> ClientApp:
        made = ClientApp(mods=[CompressMod()])
        made.train()(also)
        return made

    grid = LoopbackGrid(make, 2)
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


def test_a_lost_reply_and_missed_rounds_are_made_up_for() -> None:
    grid = LoopbackGrid(WITH, 3)
    codecs = CodecGrid(grid, "fp32", downlink="int8")
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

    def make() -> ClientApp:
        made = ClientApp(mods=[CompressMod()])
        made.train()(diverged)
        return made

    for codec in ("int4", "fp32"):
        grid = LoopbackGrid(WITH, 2)
        grid.apps[101] = make
        replies = CodecGrid(grid, codec).send_and_receive(messages(record(model()), [100, 101]))
        assert [r.has_error() for r in replies] == [False, True]


def test_a_fitted_codec_from_a_folder_goes_both_ways(tmp_path: Any) -> None:
    update = {n: torch.randn(v.shape) for n, v in model().items() if n.startswith("lora")}
    recorded = SecondMoments(UpdateSpec.of(update), gc.SubspaceConfig(ratio=2))
    for _ in range(8):
        recorded.add({n: torch.randn(t.shape) for n, t in update.items()})
    fitted = gc.Chain(gc.fit_subspace(recorded), gc.BlockQuant(gc.BlockQuantConfig(8)))
    fitted.save_pretrained(tmp_path / "codec")
    frozen = [("frozen", "fp32")]
    with pytest.raises(GradcodecError, match="no such codec or folder"):
        CodecGrid(LoopbackGrid(WITH, 1), "no such codec or folder")
    grid = LoopbackGrid(WITH, 2)
    after = run(grid, str(tmp_path / "codec"), downlink="int8", rules=frozen)
    assert np.isfinite(after[-1]["lora_A"]).all()


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

    def make() -> ClientApp:
        made = ClientApp(mods=[CompressMod()])
        made.train()(one_row)
        return made

    grid = CodecGrid(LoopbackGrid(make, 1), "int4")
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

    def make() -> ClientApp:
        made = ClientApp(mods=[CompressMod()])
        made.train()(spying)
        return made

    codecs = CodecGrid(LoopbackGrid(make, 2), "int4")
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
