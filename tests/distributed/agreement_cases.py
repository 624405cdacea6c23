"""Ranks that were given different things: one error, the same at all of them, and nobody dies.

Run by every rank of a world, see ``test_agreement.py``. Rank 0 does as the others do, but for one
thing; after the error the world goes on, which no rank survives that was aborted.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.toy import CAP, everywhere, net, sgd, train, wrapped
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradcodec.distributed.exchange.agreement as agreement
from gradcodec.chain import Chain
from gradcodec.codecs import BlockQuant, Subspace
from gradcodec.distributed import (
    CompressState,
    LowRank,
    Residuals,
    compress,
    compress_hook,
    compressed_all_gather,
    compressed_all_reduce,
    compressed_reduce_scatter,
    register_compressed_backend,
    scatter_residual_numel,
)
from gradcodec.errors import AgreementError
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.registry import make_codec
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import TensorSpec, UpdateSpec


def all_are_told(act: Callable[[], Any], *says: str) -> None:
    """Every rank ends with one text, of this class, and can talk to the others afterwards."""
    with pytest.raises(AgreementError) as told:
        act()
    text = str(told.value)
    assert "\n" not in text
    for pattern in says:
        assert re.search(pattern, text), text
    digest = torch.tensor(list(hashlib.sha256(text.encode()).digest()))
    assert all(torch.equal(digest, other) for other in everywhere(digest)), text


def subspace(model: nn.Module, seed: int, rank: int = 12) -> Subspace:
    """Random orthonormal bases for the large matrices."""
    large = {n: p for n, p in model.named_parameters() if p.numel() > 4096}
    spec = UpdateSpec(tuple(TensorSpec(n, tuple(p.shape)) for n, p in large.items()))
    config = SubspaceConfig(ratio=8, basis_dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    bases = {}
    for t in spec:
        axis = Axis.choose(t, config)
        bases[t.name] = (axis, torch.linalg.qr(torch.randn(axis.size, rank, generator=generator)).Q)
    return Subspace.from_bases(config, spec, bases)


# -- DDP, settings --------------------------------------------------------------------------------

_REST = [("*.bias", "fp32"), ("10.*", "fp32")]


def _learned(make: Callable[[Subspace], Any]) -> Callable[[int], dict[str, Any]]:
    return lambda seed: {"codec": make(subspace(net(), seed)), "rules": _REST}


#: Options of rank 0, of the others, and what the error says of the difference.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "codec": ({"codec": "int4"}, {"codec": "int8"}, "codec: 'int4' on rank 0, 'int8' on rank"),
    "blocks": (
        {"codec": BlockQuant(BlockQuantConfig(4, 256))},
        {"codec": BlockQuant(BlockQuantConfig(4, 257))},
        "block=257",
    ),
    "exact": ({"codec": "fp32"}, {"codec": "int4"}, "codec: 'fp32' on rank 0, 'int4'"),
    "rules": ({}, {"rules": [("2.weight", "fp32")]}, r"rules: '' on rank 0, \"'2.weight'"),
    "order of rules": (
        {"rules": [("2.*", "fp32"), ("*.weight", "int8")]},
        {"rules": [("*.weight", "int8"), ("2.*", "fp32")]},
        "rules",
    ),
    "min_numel": ({}, {"min_numel": 0}, "min_numel: '4096' on rank 0, '0' on rank"),
    "start_step": ({}, {"start_step": 2}, "start_step: '0' on rank 0, '2' on rank"),
    "seed": ({}, {"seed": 1}, "seed: '0' on rank 0, '1' on rank"),
    "feedback": ({}, {"error_feedback": False}, "error_feedback: 'auto' on rank 0, 'False' on"),
    "rank": ({"codec": LowRank(4)}, {"codec": LowRank(2)}, "rank=4.* on rank 0, .*rank=2"),
    "refresh": ({"codec": LowRank()}, {"codec": LowRank(refresh=3)}, "refresh=3"),
    "coordinates": ({"codec": LowRank()}, {"codec": LowRank(code="int4")}, "code='int4'"),
    "auto": ({"codec": "auto"}, {"codec": "int4"}, "codec: 'auto, int4' on rank 0, 'int4'"),
    "auto of another codec": ({"codec": "auto"}, {"codec": "auto:int8"}, "'auto, int8' on rank"),
}

#: The same for learned codecs, whose options are made at each rank.
LEARNED: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "bases": (_learned(lambda s: s), "codec: .*digest"),
    "bases in a chain": (_learned(lambda s: Chain(s, make_codec("int4"))), "codec: .*digest"),
    "bases by a rule": (
        lambda seed: {"rules": [("2.weight", subspace(net(), seed)), *_REST]},
        "rules: .*digest",
    ),
}


def settings_that_differ_are_told_when_the_state_is_made(rank: int, world: int) -> None:
    for mine, others, says in SETTINGS.values():
        options = mine if rank == 0 else others
        ddp = DistributedDataParallel(net())
        all_are_told(lambda o=options, d=ddp: CompressState(d, **o), says)  # type: ignore[misc]


def learned_codecs_of_other_bases_are_told(rank: int, world: int) -> None:
    for options, says in LEARNED.values():
        mine = options(7 if rank == 0 else 8)
        all_are_told(lambda o=mine: CompressState(net(), **o), says)  # type: ignore[misc]
        with wrapped(**options(7)) as (ddp, _):
            train(ddp, range(1), sgd(ddp))


def settings_that_are_a_ranks_own_may_differ(rank: int, world: int) -> None:
    with wrapped("int4", log_every=1 + rank, nmse_every=1 + rank) as (ddp, _):
        train(ddp, range(3), sgd(ddp))
    # A name and the codec of that name are one thing.
    with wrapped("int4" if rank else make_codec("int4")) as (ddp, _):
        train(ddp, range(2), sgd(ddp))


def models_that_differ_are_told(rank: int, world: int) -> None:
    def sizes(*numbers: int) -> dict[str, nn.Parameter]:
        return {f"w{i}": nn.Parameter(torch.zeros(n)) for i, n in enumerate(numbers)}

    other = rank > 0
    order = dict(reversed(sizes(5, 5).items())) if other else sizes(5, 5)
    all_are_told(lambda: CompressState(order), "parameter 0: 'w0: .* on rank 0, 'w1: ")
    shape = sizes(5, 6 if other else 5)
    all_are_told(lambda: CompressState(shape), r"parameter 1: 'w1: float32\[5\]")
    fewer = sizes(5) if other else sizes(5, 5)
    all_are_told(lambda: CompressState(fewer), "'nothing' on rank")
    dtype = {"w": nn.Parameter(torch.zeros(5, dtype=torch.bfloat16 if other else torch.float32))}
    all_are_told(lambda: CompressState(dtype), r"bfloat16\[5\]")


def a_refusal_of_one_rank_reaches_all(rank: int, world: int) -> None:
    rules = [("*.wieght", "fp32")] if rank == world - 1 else []
    all_are_told(
        lambda: CompressState(net(), rules=rules),
        rf"rank {world - 1} refused: ConfigError: rule '\*.wieght' matches no parameter",
    )


def a_model_that_one_rank_has_compressed_already_is_told(rank: int, world: int) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    ddp = DistributedDataParallel(net())
    if rank == 0:
        ddp.register_comm_hook(None, allreduce_hook)
    all_are_told(lambda: compress(ddp), "compress: .*rank 0 refused: ConfigError: DDP has one slot")


def a_state_made_before_the_group_compares_in_the_first_step(rank: int, world: int) -> None:
    """As in Lightning; inside the hook, and still the same class and text."""
    ready, dist.is_initialized = dist.is_initialized, lambda: False
    try:
        model = net()
        early = CompressState(model, "int4" if rank else "int8")
    finally:
        dist.is_initialized = ready
    ddp = DistributedDataParallel(model, bucket_cap_mb=CAP)
    ddp.register_comm_hook(early, compress_hook)
    all_are_told(lambda: train(ddp, range(1), sgd(ddp)), "CompressState: .*codec: 'int8' on rank 0")


def other_versions_are_told(rank: int, world: int) -> None:
    agreement.PROTOCOL += rank
    try:
        all_are_told(reduce_all, r"exchange protocol 2' on rank 0, '.* exchange protocol 3' on")
        all_are_told(lambda: CompressState(net()), "exchange protocol 3")
    finally:
        agreement.PROTOCOL -= rank


# -- DDP, what is loaded and what is trained ------------------------------------------------------


def _loaded(change: Callable[[dict[str, Any], int], None], codec: Any, *says: str) -> None:
    rank = dist.get_rank()
    with wrapped(codec) as (ddp, state):
        assert state is not None
        train(ddp, range(2), sgd(ddp))
        kept = state.state_dict()
    change(kept, rank)
    with wrapped(codec) as (ddp, state):
        assert state is not None
        state.load_state_dict(kept)
        all_are_told(lambda: train(ddp, range(1), sgd(ddp)), *says)


def states_that_differ_are_told_in_the_next_step(rank: int, world: int) -> None:
    def step(kept: dict[str, Any], rank: int) -> None:
        kept["step"] += rank

    def seed(kept: dict[str, Any], rank: int) -> None:
        kept["seed"] = rank

    def decision(kept: dict[str, Any], rank: int) -> None:
        kept["auto"] = int(rank == 0)

    def basis(kept: dict[str, Any], rank: int) -> None:
        if rank:
            kept["basis.2.weight"] = kept["basis.2.weight"].flip(0)

    def no_basis(kept: dict[str, Any], rank: int) -> None:
        if rank == 0:
            del kept["basis.2.weight"]

    _loaded(step, "int4", "step: '2' on rank 0, '3' on rank 1")
    _loaded(seed, "int4", "seed: '0' on rank 0")
    _loaded(decision, "auto", "decision of auto: '1' on rank 0, '0' on rank")
    _loaded(basis, LowRank(rank=2), "basis of 2.weight")
    _loaded(no_basis, LowRank(rank=2, refresh=3), "basis of 2.weight: 'none' on rank 0")


def a_rank_that_did_not_load_is_told(rank: int, world: int) -> None:
    with wrapped("int4") as (ddp, state):
        assert state is not None
        train(ddp, range(2), sgd(ddp))
        kept = state.state_dict()
    with wrapped("int4") as (ddp, state):
        assert state is not None
        if rank == 0:
            state.load_state_dict(kept)
        all_are_told(lambda: train(ddp, range(1), sgd(ddp)), "step: '2' on rank 0, '0' on rank")


def buckets_that_differ_are_told(rank: int, world: int) -> None:
    # Only then are the caps those of the first step; rebuilt buckets are rank 0's everywhere.
    options = {"ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": CAP if rank else 25}
    with wrapped("int4", **options) as (ddp, _):
        all_are_told(
            lambda: train(ddp, range(1), sgd(ddp)), "a bucket of gradients: .*parameters: "
        )


def what_was_agreed_is_not_asked_again(rank: int, world: int) -> None:
    """Nothing on top in steady state: from the third step on every message is a bucket's."""
    with wrapped("int4") as (ddp, state):
        assert state is not None
        optimizer = sgd(ddp)
        train(ddp, range(3), optimizer)
        asked: list[Any] = []
        state._agree = lambda *a: asked.append(a[0])  # type: ignore[method-assign]
        known, before = state._agreed, state.stats()["wire_bytes"]
        train(ddp, range(3, 4), optimizer)
        once = state.stats()["wire_bytes"] - before
        assert all(key in known for key in asked)
        del state._agree
        train(ddp, range(4, 6), optimizer)
        assert state.stats()["wire_bytes"] - before == 3 * once


# -- plain collectives ----------------------------------------------------------------------------

#: Of ``compressed_all_reduce``: arguments of rank 0, of the others, and what is said.
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "codec": ({}, {"codec": "int8"}, "codec: 'int4' on rank 0, 'int8' on rank"),
    "blocks": ({}, {"codec": BlockQuant(BlockQuantConfig(4, 257))}, "block=257"),
    "length": ({}, {"sizes": [(5001,)]}, r"tensor 0: 'float32\[5000\]' on rank 0"),
    "shape": ({}, {"sizes": [(50, 100)]}, r"float32\[50, 100\]"),
    "one more": ({}, {"sizes": [(5000,), (3,)]}, r"tensor 1: 'nothing' on rank 0"),
    "none": ({}, {"sizes": []}, r"tensor 0: 'float32\[5000\]' on rank 0, 'nothing'"),
    "dtype": ({}, {"dtype": torch.bfloat16}, r"bfloat16\[5000\]"),
    "seed": ({}, {"seed": 1}, "seed: '0' on rank 0, '1' on rank"),
    "residuals": ({}, {"kept": True}, "residuals: 'none' on rank 0, 'kept' on rank"),
    "integers": ({}, {"dtype": torch.int64}, "refused: UpdateError: expected dense floating"),
    "no codec": ({}, {"codec": "int3"}, "refused: ConfigError: expected a codec name"),
}


def reduce_all(
    codec: Any = "int4",
    sizes: Sequence[tuple[int, ...]] = ((5000,),),
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    kept: bool = False,
) -> None:
    tensors = [torch.ones(size).to(dtype) for size in sizes]
    compressed_all_reduce(tensors, codec, seed=seed, residuals=Residuals() if kept else None)


def calls_that_differ_are_told(rank: int, world: int) -> None:
    for mine, others, says in CALLS.values():
        options = mine if rank == 0 else others
        all_are_told(lambda o=options: reduce_all(**o), "compressed_all_reduce: .*" + says)  # type: ignore[misc]
    reduce_all()


def learned_codecs_of_a_call_are_told(rank: int, world: int) -> None:
    model = nn.Linear(96, 96, bias=False)
    for wrap in (lambda s: s, lambda s: Chain(s, make_codec("int4"))):
        codec = wrap(subspace(model, seed=min(rank, 1)))
        all_are_told(lambda c=codec: reduce_all(c, [(96, 96)]), "codec: .*digest")  # type: ignore[misc]


def calls_of_other_functions_are_told(rank: int, world: int) -> None:
    def scatter(n: int = 100, op: str = "mean", residual: bool = False) -> None:
        numel = scatter_residual_numel("int4", n, world)
        kept = torch.zeros(numel) if residual else None
        compressed_reduce_scatter(
            torch.zeros(n), torch.ones(world * n), "int4", op=op, residual=kept
        )

    def gather(lengths: Sequence[int]) -> None:
        outputs = [torch.zeros(n) for n in lengths]
        compressed_all_gather(outputs, torch.zeros(7 + rank), "int4")

    other = rank > 0
    all_are_told(lambda: scatter(101 if other else 100), r"output: 'float32\[100\]' on rank 0")
    all_are_told(lambda: scatter(op="sum" if other else "mean"), "op: 'mean' on rank 0")
    all_are_told(lambda: scatter(residual=other), "residual: 'none' on rank 0, 'kept'")
    all_are_told(reduce_all if other else scatter, "call: 'compressed_reduce_scatter' on rank 0")
    right = [7 + r for r in range(world)]
    all_are_told(lambda: gather([right[0] + other, *right[1:]]), "elements of each rank")
    all_are_told(lambda: gather(right[: 1 + rank]), "rank 0 refused: UpdateError")
    gather(right)
    scatter()


# -- sharded models -------------------------------------------------------------------------------


def _sharded(mesh: Any = None) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = net()
    for layer in (*[m for m in model if isinstance(m, nn.Linear)], model):
        fully_shard(layer, mesh=mesh)
    return model


#: Options of the ranks but the first.
UNITS: dict[str, tuple[dict[str, Any], str]] = {
    "codec": (
        {"codec": "int8"},
        r"codec: 'int4-unbiased' on ranks? 0.*, 'int8-unbiased' on rank 1",
    ),
    "rules": ({"rules": [("2", "fp32")]}, "rules: "),
    "feedback": ({"error_feedback": True}, "error_feedback"),
    "min_numel": ({"min_numel": 0}, "min_numel"),
    "start_step": ({"start_step": 3}, "start_step"),
    "seed": ({"seed": 3}, "seed"),
    "refused": ({"codec": "int3"}, "rank 1 refused: ConfigError"),
}


def settings_of_fully_shard_are_told(rank: int, world: int) -> None:
    model = _sharded()
    for options, says in UNITS.values():
        mine = options if rank == 1 else {}
        all_are_told(lambda o=mine: compress(model, **o), "compress: .*" + says)  # type: ignore[misc]
    compress(model)  # what was refused has left nothing behind


def settings_of_fsdp1_are_told(rank: int, world: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    codec = "int8" if rank == 1 else "int4"
    all_are_told(lambda: compress(model, codec), "codec: 'int4")
    wrong: Any = model if rank == 0 else net()
    all_are_told(lambda: CompressState(wrong), r"rank 0 refused: .* call compress\(model")


def settings_of_replicas_are_told(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard"))
    model = _sharded(mesh["shard"])
    codec = "int8" if rank == 1 else "int4"
    all_are_told(lambda: compress(model, codec, replicas=mesh["replicate"]), "codec: 'int4, with")


def units_of_other_steps_are_told(rank: int, world: int) -> None:
    model = _sharded()
    state = compress(model, "int4", min_numel=0)
    kept = state.state_dict()
    kept["steps.2"] = rank
    state.load_state_dict(kept)
    # FSDP2 reduces in the backward pass, whose errors keep their class as well.
    all_are_told(lambda: train(model, range(1), sgd(model)), "the gradients of 2: .*step: '0'")


def settings_of_a_backend_are_told(rank: int, world: int) -> None:
    for i, (mine, says) in enumerate(
        [
            ({"codec": "int8" if rank == 1 else "int4"}, "codec: 'int4' on rank"),
            ({"codec": "int4", "min_numel": rank}, "min_numel: '0' on rank 0"),
            ({"codec": "int4", "seed": rank}, "seed: '0' on rank 0"),
        ]
    ):
        register_compressed_backend(f"told{i}", **mine)
        all_are_told(lambda n=i: dist.new_group(backend=f"told{n}"), "register_compressed.*" + says)  # type: ignore[misc]


def reductions_of_a_backend_are_told(rank: int, world: int) -> None:
    register_compressed_backend("alike", "int4")
    group = dist.new_group(backend="alike")
    size = 5000 if rank else 6000
    all_are_told(
        lambda: dist.all_reduce(torch.ones(size), group=group), "of 6000 elements' on rank 0"
    )
    dist.all_reduce(torch.ones(5000), group=group)
