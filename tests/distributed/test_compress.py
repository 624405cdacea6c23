"""``compress`` on DDP, and what it refuses; FSDP and HSDP have tests of their own."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from distributed.sharded_world import Results, world

CASES = (
    "compress_ddp__native",
    "compress_ddp__fp32",
    "compress_ddp__int8",
    "compress_refusals",
    "compressions",
    "compress_without_group",
)


@lru_cache
def results(cases: tuple[str, ...]) -> Results:
    return world(2, cases)


@pytest.fixture
def two() -> Results:
    return results(CASES)


def distance(one: list[Any], other: list[Any]) -> float:
    a, b = (torch.tensor(x[0]["weights"]) for x in (one, other))
    return float((a - b).norm() / b.norm())


def test_ddp_gets_the_hook(two: Results) -> None:
    native = two["compress_ddp__native"]
    assert distance(two["compress_ddp__fp32"], native) < 1e-6
    assert 1e-6 < distance(two["compress_ddp__int8"], native) < 1e-3
    one, other = two["compress_ddp__int8"]
    assert one["digest"] == other["digest"]
    assert one["kind"] == "CompressState"


KINDS = ("ddp", "fsdp1", "fsdp2", "hsdp", "group")


@pytest.mark.parametrize("kind", KINDS)
def test_every_wrapper_gives_one_kind_of_compression(two: Results, kind: str) -> None:
    for rank in two["compressions"]:
        found, other = rank[kind], rank["ddp"]
        assert found["protocol"]
        assert found["state"]
        assert list(found["stats"]) == list(other["stats"])
        assert found["counts"][0] == found["stats"]["steps"] > 0
        assert found["counts"][1] == found["stats"]["wire_bytes"] > 0
        # gloo's own reductions of a closed world: eight bits at most are sent for 32.
        assert 2 * found["stats"]["wire_bytes"] < found["stats"]["dense_wire_bytes"]
        assert all(type(v) is str for v in found["stats"]["codecs"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_compression_ends_the_training_with_an_error(two: Results, kind: str) -> None:
    for rank in two["compressions"]:
        name, message = rank[kind]["closed"]
        assert name == "TrainingError"
        assert "closed" in message


def test_a_codec_that_is_used_in_place_of_another_is_named(two: Results) -> None:
    for rank in two["compressions"]:
        instead = {kind: rank[kind]["stats"]["substituted"] for kind in KINDS}
        unbiased = {"int4": "int4-unbiased"}
        assert instead == {
            "ddp": {}, "fsdp1": unbiased, "fsdp2": unbiased, "hsdp": {}, "group": {}
        }  # fmt: skip
        assert set(rank["fsdp2"]["stats"]["codecs"].values()) == {"int4-unbiased"}
        assert set(rank["hsdp"]["stats"]["codecs"].values()) == {"int4"}


@pytest.mark.slow
def test_a_compiled_model_is_unwrapped() -> None:
    found = results(("compress_ddp__native", "compress_compiled_ddp"))
    assert distance(found["compress_compiled_ddp"], found["compress_ddp__native"]) < 1e-5


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("taken", "allreduce_hook has taken it"),
        ("mixed", "mixed_precision= has taken it"),
        ("reducer", "python_reducer"),
        ("composed", "replicate()"),
        ("plain", "a plain Sequential"),
        ("inner", "its module '0'"),
        ("replicas", "replicas="),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(two: Results, case: str, says: str) -> None:
    for rank in two["compress_refusals"]:
        name, message = rank[case]
        assert name == "ConfigError"
        assert says in message


def test_without_a_group_the_call_to_make_is_named(two: Results) -> None:
    for name, message in two["compress_without_group"]:
        assert name == "ConfigError"
        assert "init_process_group" in message
