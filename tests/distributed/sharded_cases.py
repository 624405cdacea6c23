"""What each rank does in the tests of sharded training; started by ``sharded_world.py``.

A case is a function that returns JSON values. All train the same small model on data of their rank.
"""

import faulthandler
import hashlib
import itertools
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from conftest import _poisoned
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel as DDP

from gradcodec.codecs import BlockQuant
from gradcodec.distributed.compress import compress
from gradcodec.distributed.compression import Compression
from gradcodec.distributed.wrappers import sharded
from gradcodec.distributed.wrappers.ddp import CompressState
from gradcodec.distributed.wrappers.group import CompressedGroup, register_compressed_backend
from gradcodec.errors import GradcodecError, NonFiniteError
from gradcodec.packers.blockquant import BlockQuantConfig

WIDTH, CLASSES, STEPS, RATE = 131, 10, 8, 1.0
CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


def cases(**variants: dict[str, Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register ``function__variant`` for each."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for name, options in variants.items():
            CASES[f"{function.__name__}__{name}"] = lambda o=options: function(**o)
        return function

    return register


# -- model, data, training -------------------------------------------------------------------


class Block(nn.Module):
    """Widths that no world size divides."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block(), Block(), nn.Linear(WIDTH, CLASSES))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Another one for each rank and step; the label can be learned."""
    draw = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    x = torch.randn(32, WIDTH, generator=draw)
    return x, x[:, :CLASSES].argmax(1)


def train(net: nn.Module, steps: int = STEPS, start: int = 0, rate: float = RATE) -> list[float]:
    optimizer = torch.optim.SGD(net.parameters(), rate)
    losses = []
    for step in range(start, start + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x).float(), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def local(net: nn.Module) -> Tensor:
    """This rank's parameters, flat."""
    parts = [p.detach() for p in net.parameters()]
    parts = [p.to_local() if hasattr(p, "to_local") else p for p in parts]
    return torch.cat([p.flatten() for p in parts])


def result(net: nn.Module, losses: list[float], handle: Any = None) -> dict[str, Any]:
    weights = local(net)
    out: dict[str, Any] = {
        "losses": losses,
        "weights": weights.tolist(),
        "digest": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
    }
    if handle is not None:
        out["stats"] = handle.stats()
    return out


def error_of(function: Callable[[], Any]) -> list[str]:
    """Class and message of what it raises."""
    try:
        function()
    except GradcodecError as err:
        return [type(err).__name__, str(err)]
    return ["nothing", ""]


def nearest(bits: int) -> BlockQuant:
    return BlockQuant(BlockQuantConfig(bits))


def stochastic(bits: int) -> BlockQuant:
    return BlockQuant(BlockQuantConfig(bits, stochastic=True))


# -- FSDP1 -------------------------------------------------------------------------------------


def fsdp1(strategy: str = "FULL_SHARD", net: nn.Module | None = None, **options: Any) -> FSDP:
    from torch.distributed.fsdp import ShardingStrategy

    return FSDP(
        model() if net is None else net,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        **{"use_orig_params": True, **options},
    )


@cases(
    native={"codec": None},
    fp32={"codec": "fp32"},
    int8={"codec": "int8"},
    int4={"codec": "int4"},
    zero2_native={"strategy": "SHARD_GRAD_OP", "codec": None},
    zero2_int8={"strategy": "SHARD_GRAD_OP", "codec": "int8"},
    no_shard_native={"strategy": "NO_SHARD", "codec": None},
    no_shard_fp32={"strategy": "NO_SHARD", "codec": "fp32"},
    no_shard_int4={"strategy": "NO_SHARD", "codec": "int4"},
)
def trained_fsdp1(codec: str | None, strategy: str = "FULL_SHARD") -> dict[str, Any]:
    net = fsdp1(strategy)
    handle = None if codec is None else compress(net, codec, min_numel=0)
    losses = train(net)
    return result(net, losses, handle)


@cases(native={"codec": None}, fp32={"codec": "fp32"})
def fsdp1_no_sync(codec: str | None) -> dict[str, Any]:
    net = fsdp1()
    handle = None if codec is None else compress(net, codec, min_numel=0)
    x, y = batch(0)
    with net.no_sync():
        nn.functional.cross_entropy(net(x), y).backward()
    before = 0 if handle is None else handle.stats()["steps"]
    nn.functional.cross_entropy(net(x), y).backward()
    with torch.no_grad():
        for p in net.parameters():
            if p.grad is not None:
                p -= RATE * p.grad
    return {**result(net, []), "before": before}


@cases(late={"wait": False}, waited={"wait": True})
def fsdp1_behind(wait: bool) -> dict[str, Any]:
    net = fsdp1()
    handle = compress(net, nearest(4), min_numel=0, error_feedback=True)
    if wait:
        for m in net.modules():
            if isinstance(m, FSDP):
                m._comm_hook_state.late = lambda output: None
    return result(net, train(net), handle)


@cases(native={"codec": None}, fp32={"codec": "fp32"})
def fsdp1_flat(codec: str | None) -> dict[str, Any]:
    """One flat parameter a unit, gradients clipped, a block used twice behind a checkpoint."""
    torch.manual_seed(0)
    net = fsdp1(net=Twice(use_reentrant=False), use_orig_params=False)
    handle = None if codec is None else compress(net, codec, min_numel=0)
    optimizer, losses = torch.optim.SGD(net.parameters(), RATE), []
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        net.clip_grad_norm_(0.1)
        optimizer.step()
        losses.append(loss.item())
    return result(net, losses, handle)


@case
def fsdp1_read_within_the_pass() -> list[bool]:
    """A gradient that is read before the pass ends is NaN, and not a number that looks right."""
    net, found, were_nan = fsdp1(), [], []
    compress(net, "fp32", min_numel=0)

    def look(*_: Any) -> None:
        found.extend(p.grad for p in net[2].parameters() if p.grad is not None)
        were_nan.append(all(bool(t.isnan().all()) for t in found))

    net[0].register_full_backward_hook(look)
    x, y = batch(0)
    nn.functional.cross_entropy(net(x.requires_grad_()), y).backward()
    return [bool(found), all(were_nan), all(bool(t.isfinite().all()) for t in found)]


@case
def fsdp1_failed_reduction() -> list[list[str]]:
    """What the next forward pass, and one after ``close``, say after a reduction has failed."""
    logging.disable(logging.CRITICAL)
    net = fsdp1()
    handle = compress(net, "int4", min_numel=0)
    real = sharded.reduce_scatter
    sharded.reduce_scatter = fails_at(0, real, itertools.count())
    x, y = batch(0)
    told = [error_of(lambda: nn.functional.cross_entropy(net(x), y).backward())]
    sharded.reduce_scatter = real
    told.append(error_of(lambda: net(x)))
    with torch.no_grad():
        told.append(error_of(lambda: net(x)))
    handle.close()
    told.append(error_of(lambda: net(x)))
    logging.disable(logging.NOTSET)
    return told


@case
def fsdp1_goes_on() -> bool:
    """The last block's reduction does not begin before the backward pass has reached the first."""
    return goes_on(fsdp1())


@cases(native={"codec": None}, fp32={"codec": "fp32"})
def fsdp1_added(codec: str | None) -> dict[str, Any]:
    """Two backward passes that both reduce, into one gradient."""
    return added(fsdp1(), codec)


@cases(
    native={"codec": None},
    fp32={"codec": "fp32"},
    zeroed_native={"codec": None, "zeroed": True},
    zeroed_fp32={"codec": "fp32", "zeroed": True},
)
def fsdp1_failed_pass(codec: str | None, zeroed: bool = False) -> dict[str, Any]:
    """Training after a pass that an error has ended midway on all ranks."""
    return failed_pass(fsdp1(), codec, zeroed)


@cases(native={"codec": None}, fp32={"codec": "fp32"})
def fsdp1_mixed(codec: str | None) -> dict[str, Any]:
    """Gradients in another dtype than the parameters: they are read at once."""
    from torch.distributed.fsdp import MixedPrecision

    net = fsdp1(mixed_precision=MixedPrecision(param_dtype=torch.bfloat16))
    handle = None if codec is None else compress(net, codec, min_numel=0)
    state, seen = net._comm_hook_state, []
    if handle is not None:
        late = state.late
        state.late = lambda output: seen.append(late(output)) or seen[-1]
    return {**result(net, train(net), handle), "late": seen}


@cases(sharded={"strategy": "FULL_SHARD"}, no_shard={"strategy": "NO_SHARD"})
def fsdp1_resumed(strategy: str) -> dict[str, Any]:
    """Half, state saved and loaded into a new wrapper, other half; beside the whole."""
    options: dict[str, Any] = {"min_numel": 0, "error_feedback": True}
    whole = fsdp1(strategy)
    compress(whole, nearest(4), **options)
    losses = train(whole)
    first = fsdp1(strategy)
    saved = compress(first, nearest(4), **options)
    begun = train(first, STEPS // 2)
    second = fsdp1(strategy)
    with torch.no_grad():
        for mine, theirs in zip(second.parameters(), first.parameters(), strict=True):
            mine.copy_(theirs)
    loaded = compress(second, nearest(4), **options)
    loaded.load_state_dict(through_safetensors(saved.state_dict()))
    rest = train(second, STEPS - STEPS // 2, start=STEPS // 2)
    return {
        "whole": losses,
        "resumed": begun + rest,
        "equal": torch.equal(local(whole), local(second)),
        "residual_bytes": saved.stats()["residual_bytes"],
    }


def through_safetensors(state: dict[str, Tensor | int]) -> dict[str, Tensor | int]:
    """Plain tensors and ints survive a file format that knows nothing else."""
    from safetensors.torch import load, save

    tensors = {k: v if isinstance(v, Tensor) else torch.tensor(v) for k, v in state.items()}
    return {k: v if v.ndim else int(v) for k, v in load(save(tensors)).items()}


@case
def fsdp1_refusals() -> dict[str, Any]:
    from torch.distributed.fsdp import ShardingStrategy

    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s"))
    hybrid = FSDP(
        model(),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        device_mesh=mesh,
        device_id=torch.device("cpu"),
    )
    taken = fsdp1()
    compress(taken, "int8")
    inner = nn.Sequential(fsdp1())
    return {
        "hybrid": error_of(lambda: compress(hybrid)),
        "taken": error_of(lambda: compress(taken)),
        "inner": error_of(lambda: compress(inner)),
        "state": error_of(lambda: CompressState(fsdp1())),
    }


# -- FSDP2 -------------------------------------------------------------------------------------


def fsdp2(mesh: DeviceMesh | None = None, net: nn.Module | None = None, **options: Any) -> Any:
    net = model() if net is None else net
    for child in net.modules():
        if isinstance(child, Block):
            fully_shard(child, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
REDUCE_FP32 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
REDUCE_FP16 = MixedPrecisionPolicy(reduce_dtype=torch.float16)


@cases(
    native={"codec": None},
    fp32={"codec": "fp32"},
    int8={"codec": "int8"},
    int4={"codec": "int4"},
    int2={"codec": "int2"},
    bf16_native={"codec": None, "policy": BF16},
    bf16_fp32={"codec": "fp32", "policy": BF16},
    bf16_int8={"codec": "int8", "policy": BF16},
    reduce_fp32_native={"codec": None, "policy": REDUCE_FP32},
    reduce_fp32_int8={"codec": "int8", "policy": REDUCE_FP32},
    reduce_fp16_native={"codec": None, "policy": REDUCE_FP16},
    reduce_fp16_fp32={"codec": "fp32", "policy": REDUCE_FP16},
)
def trained_fsdp2(codec: str | None, policy: MixedPrecisionPolicy | None = None) -> dict[str, Any]:
    net = fsdp2(**({} if policy is None else {"mp_policy": policy}))
    handle = None if codec is None else compress(net, codec, min_numel=0)
    return result(net, train(net), handle)


@cases(native={"codec": None}, fp32={"codec": "fp32"}, int8={"codec": "int8"})
def fsdp2_divided(codec: str | None) -> dict[str, Any]:
    """A divide factor of the user's; gloo has no PREMUL_SUM, so both force sums."""
    net = fsdp2()
    for m in net.modules():
        if isinstance(m, FSDPModule):
            m.set_gradient_divide_factor(3.0)
            m.set_force_sum_reduction_for_comms(True)
    if codec is not None:
        compress(net, codec, min_numel=0)
    return result(net, train(net))


@case
def fsdp2_premul_sum() -> list[str]:
    net = fsdp2()
    compress(net, "int8", min_numel=0)
    for m in net.modules():
        if isinstance(m, FSDPModule):
            m.set_gradient_divide_factor(3.0)
            m.set_force_sum_reduction_for_comms(False)
    return error_of(lambda: train(net, 1))


@cases(native={"codec": None}, fp32={"codec": "fp32"})
def fsdp2_accumulated(codec: str | None) -> dict[str, Any]:
    net = fsdp2()
    handle = None if codec is None else compress(net, codec, min_numel=0)
    optimizer = torch.optim.SGD(net.parameters(), RATE)
    counts = []
    for step in range(4):
        net.set_requires_gradient_sync(step % 2 == 1)
        x, y = batch(step)
        nn.functional.cross_entropy(net(x), y).backward()
        counts.append(0 if handle is None else handle.stats()["steps"])
        if step % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
    return {**result(net, []), "counts": counts}


class Sometimes(nn.Module):
    """Its second layer is used in every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        x = torch.tanh(self.first(x))
        return self.head(x) if self.step % 2 else self.head(x) + self.second(x)


@cases(
    native={"codec": None},
    fp32={"codec": "fp32"},
    feedback={"codec": "int4", "error_feedback": True},
)
def fsdp2_varying(codec: str | None, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    net = fully_shard(Sometimes())
    handle = None if codec is None else compress(net, codec, min_numel=0, **options)
    return result(net, train(net), handle)


@case
def fsdp2_frozen() -> dict[str, Any]:
    """Frozen parameters are no part of the unit that feedback waits for."""
    net = model()
    for block in list(net)[:3]:
        block.linear.bias.requires_grad_(False)
    net = fsdp2(net=net)
    handle = compress(net, "int4", min_numel=0, error_feedback=True)
    return result(net, train(net), handle)


@cases(feedback={"codec": nearest(2), "error_feedback": True}, dither={"codec": "int4"})
def fsdp2_resumed(codec: Any, **options: Any) -> dict[str, Any]:
    whole = fsdp2()
    compress(whole, codec, min_numel=0, **options)
    losses = train(whole)
    first = fsdp2()
    saved = compress(first, codec, min_numel=0, **options)
    begun = train(first, STEPS // 2)
    second = fsdp2()
    second.load_state_dict(first.state_dict())
    loaded = compress(second, codec, min_numel=0, **options)
    loaded.load_state_dict(through_safetensors(saved.state_dict()))
    rest = train(second, STEPS - STEPS // 2, start=STEPS // 2)
    return {
        "whole": losses,
        "resumed": begun + rest,
        "equal": torch.equal(local(whole), local(second)),
        "residual_bytes": saved.stats()["residual_bytes"],
    }


@cases(
    off={"codec": nearest(1), "error_feedback": False},
    on={"codec": nearest(1), "error_feedback": True},
    dense={"codec": "fp32"},
)
def fsdp2_signs(codec: Any, **options: Any) -> dict[str, Any]:
    """Many small steps, in which one bit is enough only if its error is sent later."""
    net = fsdp2()
    handle = compress(net, codec, min_numel=0, **options)
    return result(net, train(net, 40, rate=0.1), handle)


@case
def fsdp2_started_late() -> dict[str, Any]:
    net = fsdp2()
    handle = compress(net, "int4", min_numel=0, start_step=3)
    wire = [0]
    for step in range(5):
        train(net, 1, start=step)
        wire.append(handle.stats()["wire_bytes"])
    return {"sent": [b - a for a, b in itertools.pairwise(wire)]}


@case
def fsdp2_ruled() -> dict[str, Any]:
    net = fsdp2()
    rules = [("1", "fp32"), ("2.linear.*", "int8")]
    handle = compress(net, "int4", rules=rules, min_numel=1000)
    train(net, 2)
    return handle.stats()


@case
def fsdp2_grouped() -> dict[str, Any]:
    """``fully_shard([a, b])`` is one unit of two modules."""
    net = model()
    fully_shard([net[0], net[1]])
    fully_shard(net)
    handle = compress(net, "fp32", min_numel=0)
    return result(net, train(net), handle)


@case
def fsdp2_compiled() -> dict[str, Any]:
    net = model()
    for i in range(3):
        net[i] = torch.compile(net[i], backend="aot_eager")
        fully_shard(net[i])
    fully_shard(net)
    handle = compress(net, "fp32", min_numel=0)
    return result(net, train(net), handle)


# -- reductions behind the backward pass --------------------------------------------------------


def waits_for_each(net: Any) -> None:
    """Let FSDP2 read every gradient as soon as it is reduced, so that nothing may come later."""
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda _: None)


@cases(
    late={"wait": False},
    waited={"wait": True},
    late_by_three={"wait": False, "factor": 3.0},
    waited_by_three={"wait": True, "factor": 3.0},
)
def fsdp2_behind(wait: bool, factor: float | None = None) -> dict[str, Any]:
    net = fsdp2()
    if factor is not None:
        for m in net.modules():
            if isinstance(m, FSDPModule):
                m.set_gradient_divide_factor(factor)
    handle = compress(net, nearest(4), min_numel=0, error_feedback=True)
    if wait:
        waits_for_each(net)
    return result(net, train(net), handle)


@case
def fsdp2_goes_on() -> bool:
    """The last block's reduction does not begin before the backward pass has reached the first."""
    return goes_on(fsdp2())


def goes_on(net: Any) -> bool:
    handle = compress(net, "int4", min_numel=0)
    train(net, 1)
    reached = threading.Event()
    net[0].register_full_backward_pre_hook(lambda *_: reached.set())
    real, seen = sharded.reduce_scatter, []

    def held(*args: Any, **options: Any) -> Any:
        seen.append(reached.wait(20))
        return real(*args, **options)

    sharded.reduce_scatter = held
    try:
        train(net, 1, start=1)
    finally:
        sharded.reduce_scatter = real
    handle.close()
    return len(seen) == 4 and all(seen)


@cases(native={"codec": None}, fp32={"codec": "fp32"})
def fsdp2_added(codec: str | None) -> dict[str, Any]:
    """Two backward passes that both reduce, into one gradient."""
    return added(fsdp2(), codec)


def added(net: Any, codec: str | None) -> dict[str, Any]:
    handle = None if codec is None else compress(net, codec, min_numel=0)
    for step in range(2):
        x, y = batch(step)
        nn.functional.cross_entropy(net(x), y).backward()
    with torch.no_grad():
        for p in net.parameters():
            if p.grad is not None:  # a rank may have no part of it
                p -= RATE * p.grad
    return result(net, [], handle)


class Twice(nn.Module):
    """One block used twice, once behind a checkpoint; a reentrant one runs a pass of its own."""

    def __init__(self, use_reentrant: bool = True) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(WIDTH, CLASSES)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(
            self.block, self.block(x), use_reentrant=self.use_reentrant
        )
        return self.head(x)


@cases(native={"codec": None}, fp32={"codec": "fp32"})
def fsdp2_twice(codec: str | None) -> dict[str, Any]:
    torch.manual_seed(0)
    net = fsdp2(net=Twice())
    handle = None if codec is None else compress(net, codec, min_numel=0)
    return result(net, train(net), handle)


@cases(native={"codec": None}, fp32={"codec": "fp32"})
def fsdp2_failed_pass(codec: str | None) -> dict[str, Any]:
    """Training after a pass that an error has ended midway on all ranks."""
    return failed_pass(fsdp2(), codec)


def failed_pass(net: Any, codec: str | None, zeroed: bool = False) -> dict[str, Any]:
    handle = None if codec is None else compress(net, codec, min_numel=0)
    broken = net[1].register_full_backward_pre_hook(lambda *_: 1 / 0)
    x, y = batch(0)
    loss = nn.functional.cross_entropy(net(x), y)
    try:
        loss.backward()
    except ZeroDivisionError:
        broken.remove()
    if zeroed:
        net.zero_grad(set_to_none=False)
    return result(net, train(net), handle)


def fails_at(number: int, real: Callable[..., Any], calls: Iterator[int]) -> Callable[..., Any]:
    def call(*given: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise NonFiniteError("as coding would")
        return real(*given, **options)

    return call


@case
def fsdp2_failed_reduction() -> list[list[str]]:
    """What the caller of ``backward`` is told if the first, or the last, reduction of it fails."""
    logging.disable(logging.CRITICAL)
    told = []
    for bad in (0, 3):
        net = fsdp2()
        compress(net, "int4", min_numel=0)
        train(net, 1)
        real, calls = sharded.reduce_scatter, itertools.count()

        def failing(
            *given: Any, bad: int = bad, real: Any = real, calls: Any = calls, **more: Any
        ) -> Any:
            if next(calls) == bad:
                raise NonFiniteError("as coding would")
            return real(*given, **more)

        sharded.reduce_scatter = failing
        try:
            told.append(error_of(lambda net=net: train(net, 1)))
        finally:
            sharded.reduce_scatter = real
    return told


@case
def fsdp2_not_a_number() -> dict[str, Any]:
    """One rank's NaN reaches the shards it belongs to, not the residuals."""
    net = fsdp2()
    handle = compress(net, "int4", min_numel=0, error_feedback=True)
    train(net, 1)
    x, y = batch(1)
    if dist.get_rank() == 1:
        x[0, 0] = float("nan")
    nn.functional.cross_entropy(net(x), y).backward()
    bad = any(not torch.isfinite(p.grad.to_local()).all() for p in net.parameters())
    kept = [v for v in handle.state_dict().values() if isinstance(v, Tensor)]
    return {"bad": bad, "finite": all(bool(torch.isfinite(k).all()) for k in kept)}


@case
def fsdp2_other_world() -> dict[str, Any]:
    """State of other ranks: counts are taken over, residuals are not."""
    logging.disable(logging.WARNING)
    net = fsdp2()
    handle = compress(net, "int4", min_numel=0, error_feedback=True)
    train(net, 2)
    state = {**handle.state_dict(), "world": 5}
    handle.load_state_dict(state)
    after = handle.stats()
    unknown = {k: v for k, v in state.items() if k != "steps.0"}
    handle.load_state_dict({**unknown, "steps.gone": 7}, strict=False)
    counts = {name: unit.steps for name, unit in handle.units.items()}
    return {
        "loose": counts,
        "steps": after["steps"],
        "residual_bytes": after["residual_bytes"],
        "unknown": error_of(lambda: handle.load_state_dict(unknown)),
    }


@case
def fsdp2_refusals() -> dict[str, Any]:
    taken = fsdp2()
    compress(taken, "int8")
    return {
        "taken": error_of(lambda: compress(taken)),
        "codec": error_of(lambda: compress(fsdp2(), "int5")),
        "auto": error_of(lambda: compress(fsdp2(), "auto")),
        "feedback": error_of(lambda: compress(fsdp2(), error_feedback="yes")),
        "start": error_of(lambda: compress(fsdp2(), start_step=-1)),
    }


# -- HSDP --------------------------------------------------------------------------------------


def two_by(names: dict[str, str] | None = None) -> DeviceMesh:
    override = {} if names is None else {"backend_override": names}
    shape = (2, dist.get_world_size() // 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"), **override)


@case
def hsdp_native() -> dict[str, Any]:
    net = fsdp2(two_by())
    return result(net, train(net))


@cases(
    fp32={"codec": "fp32"},
    int4={"codec": "int4"},
    int2={"codec": "int2"},
)
def hsdp_by_hand(codec: str) -> dict[str, Any]:
    mesh = two_by()
    net = fsdp2(mesh["shard"])
    handle = compress(net, codec, replicas=mesh["replicate"], min_numel=0)
    return result(net, train(net), handle)


@cases(native={"codec": None}, fp32={"codec": "fp32"})
def hsdp_divided(codec: str | None) -> dict[str, Any]:
    mesh = two_by()
    net = fsdp2(mesh if codec is None else mesh["shard"])
    for m in net.modules():
        if isinstance(m, FSDPModule):
            m.set_gradient_divide_factor(3.0)
            m.set_force_sum_reduction_for_comms(True)
    if codec is not None:
        compress(net, codec, replicas=mesh["replicate"], min_numel=0)
    return result(net, train(net))


@cases(
    fp32={"codec": "fp32", "name": "hsdp_fp32"},
    int8={"codec": stochastic(8), "name": "hsdp_int8"},
)
def hsdp_by_backend(codec: Any, name: str) -> dict[str, Any]:
    register_compressed_backend(name, codec, min_numel=64)
    net = fsdp2(two_by({"replicate": name}))
    handle = compress(net)
    assert isinstance(handle, CompressedGroup)
    return result(net, train(net), handle)


@case
def hsdp_refusals() -> dict[str, Any]:
    mesh = two_by()
    unequal = model(seed=dist.get_rank() // 2)
    unequal = fsdp2(mesh["shard"], net=unequal)
    twice = fsdp2(mesh["shard"])
    compress(twice, replicas=mesh["replicate"])
    register_compressed_backend("hsdp_set", "int8")
    return {
        "native": error_of(lambda: compress(fsdp2(mesh), "int8")),
        "both": error_of(lambda: compress(fsdp2(mesh), replicas=mesh["replicate"])),
        "unequal": error_of(lambda: compress(unequal, replicas=mesh["replicate"])),
        "twice": error_of(lambda: compress(twice, replicas=mesh["replicate"])),
        "set": error_of(lambda: compress(fsdp2(two_by({"replicate": "hsdp_set"})), "int4")),
    }


# -- the backend -------------------------------------------------------------------------------


def everyone(backend: str) -> Any:
    return dist.new_group(list(range(dist.get_world_size())), backend=backend)


def noise(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(numel, generator=draw).to(dtype)


@case
def backend_semantics() -> dict[str, Any]:
    """Reductions beside gloo's, and all that must pass through untouched."""
    register_compressed_backend("lossy", nearest(8), min_numel=1000)
    group, size, rank = everyone("lossy"), dist.get_world_size(), dist.get_rank()
    out: dict[str, Any] = {}
    for name, op in (("sum", dist.ReduceOp.SUM), ("avg", dist.ReduceOp.AVG)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            mine, exact = noise(4999, dtype), noise(4999, dtype).float()
            dist.all_reduce(mine, op=op, group=group)
            dist.all_reduce(exact, op=op)
            error = float((mine.float() - exact).norm() / exact.norm())
            out[f"{name} {dtype}"] = error
            out[f"{name} {dtype} digest"] = hashlib.sha256(
                mine.view(torch.uint8).numpy().tobytes()
            ).hexdigest()

    def equal(name: str, mine: Tensor, exact: Tensor, **options: Any) -> None:
        dist.all_reduce(mine, group=group, **options)
        dist.all_reduce(exact, **options)
        out[name] = torch.equal(mine, exact)

    equal("small", noise(999), noise(999))
    equal("double", noise(4999, torch.float64), noise(4999, torch.float64))
    equal("max", noise(4999), noise(4999), op=dist.ReduceOp.MAX)
    equal("int", torch.arange(4999) * rank, torch.arange(4999) * rank)
    equal("empty", noise(0), noise(0))
    sent = noise(4999)
    dist.broadcast(sent, src=1, group=group)
    out["broadcast"] = torch.equal(sent, torch.randn(4999, generator=seeded(1)))
    gathered = [torch.zeros(4999) for _ in range(size)]
    dist.all_gather(gathered, noise(4999), group=group)
    out["all_gather"] = all(
        torch.equal(g, torch.randn(4999, generator=seeded(r))) for r, g in enumerate(gathered)
    )
    part, exact = torch.zeros(2000), torch.zeros(2000)
    dist.reduce_scatter(part, list(noise(2000 * size).chunk(size)), group=group)
    dist.reduce_scatter(exact, list(noise(2000 * size).chunk(size)))
    out["reduce_scatter"] = torch.equal(part, exact)
    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank}, group=group)
    out["objects"] = objects == [{"rank": r} for r in range(size)]
    dist.barrier(group=group)
    work = dist.all_reduce(noise(4999), group=group, async_op=True)
    out["async"] = bool(work.wait()) and work.is_completed()
    future = dist.all_reduce(noise(4999), group=group, async_op=True).get_future()
    out["future"] = list(future.wait()[0].shape)
    out["premul"] = error_of(
        lambda: group.allreduce([noise(4999)], options_of(dist.ReduceOp.PREMUL_SUM(0.5)))
    )
    out["shape"] = list(shaped(group).shape)
    out["stats"] = group.stats()
    return out


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def options_of(op: Any) -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = op
    return options


def shaped(group: Any) -> Tensor:
    """A tensor of two dimensions, not contiguous."""
    t = noise(6000).view(60, 100).t()
    dist.all_reduce(t, group=group)
    return t


@case
def backend_under_stress() -> bool:
    """Many reductions of both kinds in flight: nothing may wait for Python's lock for ever."""
    register_compressed_backend("lossy", nearest(8), min_numel=1000)
    group = everyone("lossy")
    for _ in range(300):
        works = [dist.all_reduce(noise(500), group=group, async_op=True) for _ in range(4)]
        dist.all_reduce(noise(2000), group=group)
        dist.broadcast(noise(500), src=0, group=group)
        dist.barrier(group=group)
        for work in works:
            work.wait()
    return True


@case
def backend_not_contiguous() -> float:
    register_compressed_backend("lossy", nearest(8), min_numel=1000)
    group = everyone("lossy")
    mine = shaped(group)
    exact = noise(6000).view(60, 100).t()
    flat = exact.contiguous()
    dist.all_reduce(flat)
    return float((mine - flat).norm() / flat.norm())


@cases(
    native={"name": None},
    fp32={"codec": "fp32", "name": "ddp_fp32"},
    int8={"codec": stochastic(8), "name": "ddp_int8"},
)
def backend_under_ddp(name: str | None, codec: Any = None) -> dict[str, Any]:
    """No hook at all; DDP's own metadata must pass through."""
    if name is not None:
        register_compressed_backend(name, codec, min_numel=64)
    group = None if name is None else everyone(name)
    net = DDP(model(seed=dist.get_rank()), process_group=group)
    losses = train(net)
    return result(net, losses, group)


@cases(
    native={"name": None},
    fp32={"codec": "fp32", "name": "replicate_fp32"},
    int8={"codec": stochastic(8), "name": "replicate_int8"},
)
def backend_under_replicate(name: str | None, codec: Any = None) -> dict[str, Any]:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    override = {}
    if name is not None:
        register_compressed_backend(name, codec, min_numel=64)
        override = {"backend_override": {"replicate": name}}
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size(),), mesh_dim_names=("replicate",), **override
    )
    net = model()
    for child in list(net)[:3]:
        replicate(child, mesh=mesh)
    replicate(net, mesh=mesh)
    refused = error_of(lambda: compress(net)) if name is None else []
    handle = None if name is None else compress(net)
    return {**result(net, train(net), handle), "refused": refused}


@case
def backend_refusals() -> dict[str, Any]:
    register_compressed_backend("mine", "int8")
    register_compressed_backend("mine", "int8")
    return {
        "again": error_of(lambda: register_compressed_backend("mine", "int4")),
        "gloo": error_of(lambda: register_compressed_backend("gloo", "int4")),
        "name": error_of(lambda: register_compressed_backend("Cpu:x", "int4")),
        "codec": error_of(lambda: register_compressed_backend("other", "int5")),
        "min_numel": error_of(lambda: register_compressed_backend("other", "int4", min_numel=-1)),
    }


@case
def backend_resumed() -> dict[str, Any]:
    """The dither depends on the count, which is kept."""
    register_compressed_backend("counted", stochastic(4), min_numel=64)
    first, second, fresh = (everyone("counted") for _ in range(3))
    dist.all_reduce(noise(5000), group=first)
    second.load_state_dict(first.state_dict())
    outs = []
    for group in (first, second, fresh):
        t = noise(5000)
        dist.all_reduce(t, group=group)
        outs.append(t)
    return {"same": torch.equal(outs[0], outs[1]), "other": torch.equal(outs[0], outs[2])}


# -- compress ----------------------------------------------------------------------------------


@cases(native={"codec": None}, fp32={"codec": "fp32"}, int8={"codec": "int8"})
def compress_ddp(codec: str | None) -> dict[str, Any]:
    net = DDP(model())
    handle = None if codec is None else compress(net, codec, min_numel=0)
    losses = train(net)
    weights = result(net, losses)
    return {**weights, "kind": type(handle).__name__}


@case
def compress_compiled_ddp() -> dict[str, Any]:
    net = DDP(model())
    compiled = torch.compile(net, backend="aot_eager")
    handle = compress(compiled, "fp32", min_numel=0)
    losses = train(compiled)
    return {**result(net, losses), "kind": type(handle).__name__}


@contextmanager
def optimize_ddp(mode: str) -> Iterator[None]:
    import torch._dynamo

    before = torch._dynamo.config.optimize_ddp
    torch._dynamo.config.optimize_ddp = mode
    try:
        yield
    finally:
        torch._dynamo.config.optimize_ddp = before


@case
def compress_refusals() -> dict[str, Any]:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel.distributed import _MixedPrecision

    taken = DDP(model())
    taken.register_comm_hook(None, allreduce_hook)
    mixed = DDP(model(), mixed_precision=_MixedPrecision(reduce_dtype=torch.float32))
    with optimize_ddp("python_reducer"):
        reducer = DDP(model())
    composed = model()
    from torch.distributed._composable import replicate

    replicate(composed)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "taken": error_of(lambda: compress(taken)),
        "mixed": error_of(lambda: compress(mixed)),
        "reducer": error_of(lambda: compress(reducer)),
        "composed": error_of(lambda: compress(composed)),
        "plain": error_of(lambda: compress(model())),
        "inner": error_of(lambda: compress(nn.Sequential(DDP(model())))),
        "replicas": error_of(lambda: compress(DDP(model()), replicas=mesh)),
    }


def of_a_group(name: str) -> tuple[nn.Module, Any]:
    register_compressed_backend(name, "int8-unbiased", min_numel=64)
    group = everyone(name)
    return DDP(model(), process_group=group), group


def of_hsdp() -> tuple[nn.Module, Any]:
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicate", "shard")
    )
    net = fsdp2(mesh["shard"])
    return net, compress(net, "int4", replicas=mesh["replicate"], min_numel=0)


def of_wrapped(net: nn.Module) -> tuple[nn.Module, Any]:
    return net, compress(net, "int4", min_numel=0)


COMPRESSIONS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ddp": lambda: of_wrapped(DDP(model())),
    "fsdp1": lambda: of_wrapped(fsdp1()),
    "fsdp2": lambda: of_wrapped(fsdp2()),
    "hsdp": of_hsdp,
    "group": lambda: of_a_group("closed"),
}


@case
def compressions() -> dict[str, Any]:
    """Every kind of compression, used and closed in one way."""
    out = {}
    for name, make in COMPRESSIONS.items():
        net, made = make()
        with made as handle:
            train(net, 2)
            state = handle.state_dict()
            handle.load_state_dict(state, strict=False)
            known = sorted(handle.state_dict()) == sorted(state)
        out[name] = {
            "protocol": isinstance(handle, Compression),
            "counts": [handle.step, handle.traffic.wire],
            "stats": handle.stats(),
            "state": known and all(isinstance(v, Tensor | int) for v in state.values()),
            "closed": error_of(lambda net=net: train(net, 1)),  # type: ignore[misc]
        }
    return out


@case
def compress_without_group() -> list[str]:
    """Last: it takes the world down."""
    dist.destroy_process_group()
    return error_of(lambda: compress(model()))


def main() -> None:
    folder, seconds, *wanted = sys.argv[1:]
    faulthandler.dump_traceback_later(float(seconds) * 0.9)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.empty, torch.empty_like = _poisoned(torch.empty), _poisoned(torch.empty_like)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    out = {name: CASES[name]() for name in wanted}
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    (Path(folder) / f"out{rank}.json").write_text(json.dumps(out))


if __name__ == "__main__":
    main()
