"""What is handed over wrongly is refused there: a ``ConfigError`` that says what came.

No other rank is needed for that, so these run in a world of one, or before there is a world.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.toy import net
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradcodec.codecs import BlockQuant
from gradcodec.distributed import (
    CompressState,
    LocalSteps,
    LowRank,
    Residuals,
    compress,
    compress_hook,
    compressed_all_reduce,
    compressed_reduce_scatter,
    register_compressed_backend,
)
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.registry import make_codec
from gradcodec.types import TensorSpec, UpdateSpec


def test_without_a_group_the_call_to_make_is_named() -> None:
    """First in this file: from the next test on there is a group."""
    with pytest.raises(ConfigError, match="init_process_group"):
        compressed_all_reduce(torch.ones(5), "int4")


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path(store)}",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=20),
    )
    yield
    dist.destroy_process_group()


def sharded(version: int) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    if version == 1:
        return FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    model = net()
    fully_shard(model)
    return model


#: Every way in which a codec is handed over.
TAKERS: dict[str, Any] = {
    "state": lambda codec: CompressState(net(), codec),
    "rule": lambda codec: CompressState(net(), rules=[("*", codec)]),
    "coordinates": lambda codec: CompressState(net(), LowRank(code=codec)),
    "ddp": lambda codec: compress(DistributedDataParallel(net()), codec),
    "fsdp1": lambda codec: compress(sharded(1), codec),
    "fsdp2": lambda codec: compress(sharded(2), codec),
    "unit": lambda codec: compress(sharded(2), rules=[("*", codec)]),
    "call": lambda codec: compressed_all_reduce(torch.ones(5), codec),
    "backend": lambda codec: register_compressed_backend("handed", codec),
}

WRONG_CODECS: dict[str, tuple[Any, str]] = {
    "a class": (BlockQuant, "got the class BlockQuant"),
    "its settings": (BlockQuantConfig(4), "got BlockQuantConfig"),
    "a number": (4, "got 4"),
    "a list": (["int4"], r"got \['int4'\]"),
    "an unknown name": ("int3", "expected a codec name, got"),
    "of other tensors": (
        make_codec("int4").bind(UpdateSpec((TensorSpec("other", (3,)),))),
        "needs no tensor table",
    ),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("wrong", WRONG_CODECS)
def test_what_is_no_codec_is_refused_by_all(group: None, taker: str, wrong: str) -> None:
    codec, says = WRONG_CODECS[wrong]
    with pytest.raises(ConfigError, match=says):
        TAKERS[taker](codec)


@pytest.mark.parametrize("taker", ["fsdp1", "fsdp2", "unit", "call", "backend", "coordinates"])
@pytest.mark.parametrize("scheme", ["lowrank", "auto", "auto:int8", LowRank()])
def test_schemes_of_ddp_are_refused_elsewhere(group: None, taker: str, scheme: Any) -> None:
    with pytest.raises(ConfigError, match="for DistributedDataParallel"):
        TAKERS[taker](scheme)


@pytest.mark.parametrize("taker", ["rule", "unit", "call", "backend", "state", "coordinates"])
def test_none_is_no_codec(group: None, taker: str) -> None:
    with pytest.raises(ConfigError, match="got None"):
        TAKERS[taker](None)


@pytest.mark.parametrize("model", [lambda: net(), lambda: sharded(1), lambda: sharded(2)])
@pytest.mark.parametrize(
    ("rules", "says"),
    [
        ({"*.bias": "fp32"}, r"list\(rules.items\(\)\)"),
        (("*.bias", "fp32"), r"\(pattern, codec\) pairs"),
        ("*.bias", r"got '\*.bias'"),
        ([("a", "b", "c")], "among them"),
        ([(3, "fp32")], "among them"),
        (None, "got None"),
        ([("*.wieght", "fp32")], r"rule '\*.wieght'"),
    ],
)
def test_rules_are_pairs_that_fit_something(group: None, model: Any, rules: Any, says: str) -> None:
    made = model()
    take = compress if hasattr(made, "unshard") or "Fully" in type(made).__name__ else CompressState
    with pytest.raises(ConfigError, match=says):
        take(made, rules=rules)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "wrong",
    [
        {"seed": "x"},
        {"seed": 1.5},
        {"seed": 2**64},
        {"start_step": True},
        {"min_numel": -1},
        {"log_every": 0},
        {"error_feedback": 1},
    ],
)
def test_settings_are_looked_at_alike(group: None, wrong: dict[str, Any], version: int) -> None:
    name = next(iter(wrong))
    for act in (
        lambda: CompressState(net(), **wrong),
        lambda: compress(DistributedDataParallel(net()), **wrong),
        lambda: compress(sharded(version), **wrong),
    ):
        with pytest.raises(ConfigError, match=name):
            act()


@pytest.mark.parametrize("model", [lambda: DistributedDataParallel(net()), lambda: sharded(2)])
@pytest.mark.parametrize("option", ["bogus", "process_group", "scattered"])
def test_options_that_a_wrapper_has_not_are_named(group: None, model: Any, option: str) -> None:
    with pytest.raises(ConfigError, match=f"expected an option of .*got '{option}'.*'min_numel'"):
        compress(model(), **{option: 1})


@pytest.mark.parametrize("codec", ["int4", "fp32", "lowrank", "auto:int8,int4", make_codec("int2")])
def test_a_quality_that_decides_nothing_is_refused(group: None, codec: Any) -> None:
    for act in (
        lambda: compress(DistributedDataParallel(net()), codec, quality=0.4),
        lambda: CompressState(net(), codec, quality=0.4),
    ):
        with pytest.raises(ConfigError, match="quality= says which codecs 'auto' may choose"):
            act()
    with pytest.raises(ConfigError, match=r"option of .*got 'quality'"):
        compress(sharded(2), codec if codec != "lowrank" else "int4", quality=0.4)


def test_a_share_of_residuals_that_are_not_kept_is_refused(group: None) -> None:
    with pytest.raises(ConfigError, match=r"decay=0.9 .*error_feedback=False"):
        LocalSteps(net(), decay=0.9, error_feedback=False)


def test_a_closure_that_nobody_calls_is_refused(group: None) -> None:
    with pytest.raises(ConfigError, match="optimizer is None"):
        LocalSteps(net(), every=1).step(lambda: 0.0)


def test_a_state_of_ddp_refuses_fsdp1_with_the_way_out(group: None) -> None:
    with pytest.raises(ConfigError, match=r"call compress\(model, codec\)"):
        CompressState(sharded(1))
    with pytest.raises(ConfigError, match=r"call compress\(model\)"):
        compress_hook(None, torch.zeros(3), torch.zeros(3))


def parameter(dtype: torch.dtype, **options: Any) -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.zeros(5000, **options).to(dtype))}


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(5)


def of_tensor_parallel() -> dict[str, nn.Parameter]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    return {"w": nn.Parameter(distribute_tensor(torch.zeros(96, 96), mesh, [Replicate()]))}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: parameter(torch.float8_e4m3fn), "'w' is of torch.float8_e4m3fn"),
        (lambda: parameter(torch.float32, device="meta"), "'w' is on the meta device"),
        (Lazy, "'layer.weight' has no shape yet"),
        (of_tensor_parallel, "'w' is a DTensor"),
        (lambda: sharded(2), r"compress\(model\)"),
        (lambda: net().requires_grad_(False), "at least one trainable"),
        (lambda: net().parameters(), r"parameters by name .*got generator"),
        (lambda: "model", "got str"),
    ],
)
def test_models_that_cannot_be_averaged_are_refused(group: None, model: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        CompressState(model())


@pytest.mark.parametrize("wrong", [{"process_group": "gloo"}, {"process_group": 3}])
def test_what_is_no_group_is_refused(group: None, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expected a process group"):
        CompressState(net(), **wrong)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([1.0], "got float"),
        (None, "got NoneType"),
        (torch.ones(5, dtype=torch.complex64), "complex64"),
        (torch.ones(5, device="meta"), "on meta"),
        (torch.ones(1).expand(5000), "own their elements"),
        (torch.ones(5).to(torch.float8_e4m3fn), "float8"),
    ],
)
def test_tensors_of_a_call_are_looked_at(group: None, tensors: Any, says: str) -> None:
    with pytest.raises(UpdateError, match=says):
        compressed_all_reduce(tensors, "int4")


def test_arguments_of_a_call_are_looked_at(group: None) -> None:
    wrong: Any = torch.zeros(5)
    with pytest.raises(ConfigError, match="expected Residuals"):
        compressed_all_reduce(torch.ones(5), "int4", residuals=wrong)
    with pytest.raises(ConfigError, match="seed"):
        compressed_all_reduce(torch.ones(5), "int4", seed=wrong)
    with pytest.raises(ConfigError, match="op of"):
        compressed_reduce_scatter(torch.zeros(5), torch.ones(5), "int4", op="max")
    compressed_all_reduce(torch.ones(5), "int4", residuals=Residuals())


def test_compressing_twice_is_refused(group: None) -> None:
    for model in (DistributedDataParallel(net()), sharded(1), sharded(2)):
        compress(model)
        with pytest.raises(ConfigError, match=r"taken|already"):
            compress(model)


# -- states that are loaded ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"step": "x"}, "'step': expected a whole number, got 'x'"),
        ({"step": -1}, "expected step of 0 or more, got -1"),
        ({"step": torch.zeros(2, dtype=torch.int64)}, "'step': expected a whole"),
        ({"world": "a"}, "'world'"),
        ({"first.0.weight": torch.zeros(3)}, "expected 9216 values, got torch.float32 of 3"),
        ({"first.0.weight": torch.full((9216,), torch.nan)}, "NaN or Inf"),
        ({"first.0.weight": 5.0}, "'first.0.weight': expected a floating tensor"),
        ({"first.0.weight": torch.zeros(9216, dtype=torch.int32)}, "expected a floating tensor"),
        ({"foo": 3}, "'foo' is not of this model"),
        ({3: 3}, "keys that are texts"),
    ],
)
def test_states_are_looked_at_when_they_are_loaded(
    group: None, change: dict[Any, Any], says: str
) -> None:
    state = CompressState(net(), "int4")
    kept: dict[Any, Tensor | int] = {**state.state_dict(), **change}
    with pytest.raises(ConfigError, match=says):
        state.load_state_dict(kept)
    state.close()


def test_a_codec_used_in_place_of_another_is_logged(
    group: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "gradcodec.distributed"):
        made = compress(sharded(2), log_every=1)
        assert "int4-unbiased in place of int4" in caplog.text
        caplog.clear()
        made.counters.log(1)  # type: ignore[attr-defined]
        assert "int4-unbiased in place of int4" in caplog.text
        caplog.clear()
        compress(sharded(2), error_feedback=True)
        assert caplog.text == ""


@pytest.mark.parametrize("wrong", [None, [1]])
def test_a_state_is_a_mapping(group: None, wrong: Any) -> None:
    for state in (CompressState(net()), compress(sharded(2))):
        with pytest.raises(ConfigError, match="expected a state_dict, got"):
            state.load_state_dict(wrong)
