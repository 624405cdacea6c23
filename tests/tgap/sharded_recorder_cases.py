"""What each rank does in the tests of recording under DDP, FSDP1 and ``fully_shard``."""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

from gradcodec.codecs import Identity, Subspace
from gradcodec.errors import ConfigError, NonFiniteError
from gradcodec.faf import LatentOptimizer
from gradcodec.parameters import named_parameters
from gradcodec.tgap.fit_subspace import fit_subspace
from gradcodec.tgap.recorder import GradientRecorder
from gradcodec.tgap.snapshots import SnapshotStore
from gradcodec.transforms.subspace.config import SubspaceConfig
from gradcodec.types import UpdateSpec

CONFIG = SubspaceConfig(ratio=2, basis_dtype="float32")
WIDTH = 7  # no number of ranks divides it


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(self.scale * x))


def make_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), Block(), Block(), nn.Linear(WIDTH, 3))


NAMES = [n for n, _ in make_model().named_parameters()]


def batches(rank: int) -> list[Tensor]:
    """Other data on each rank."""
    draw = torch.Generator().manual_seed(10 + rank)
    return [torch.randn(8, WIDTH, generator=draw) for _ in range(4)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).float() - 1).square().mean()


def train(model: nn.Module, rank: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in batches(rank):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()


def train_on_all(model: nn.Module, world: int) -> None:
    """The run without sharding: the mean over the ranks' batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for together in zip(*map(batches, range(world)), strict=True):
        optimizer.zero_grad()
        (sum(loss_of(model, x) for x in together) / world).backward()  # type: ignore[union-attr]
        optimizer.step()


def fsdp1(use_orig_params: bool, strategy: str = "FULL_SHARD") -> nn.Module:
    return FSDP(
        make_model(),
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=use_orig_params,
    )


def fsdp2(**options: Any) -> nn.Module:
    model = make_model()
    for block in model[1:3]:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # type: ignore[return-value]


def checkpointed_inside() -> nn.Sequential:
    model = make_model()
    model[1] = checkpoint_wrapper(model[1])
    return model


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "ddp": lambda: DDP(make_model()),
    "compiled ddp": lambda: compiled(DDP(make_model())),
    "ddp of compiled": lambda: DDP(compiled(make_model())),
    "ddp of checkpointed": lambda: DDP(checkpointed_inside()),
    "fully_shard": fsdp2,
    "compiled fully_shard": lambda: compiled(fsdp2()),
    "fsdp1": lambda: fsdp1(True),
    "fsdp1 flat": lambda: fsdp1(False),
    "fsdp1 no_shard": lambda: fsdp1(True, "NO_SHARD"),
    "fsdp1 flat zero2": lambda: fsdp1(False, "SHARD_GRAD_OP"),
    "compiled fsdp1": lambda: compiled(fsdp1(True)),
}

#: Compiling takes seconds each; once is enough.
TRAINED = {k: f for k, f in WRAPPED.items() if "compiled" not in k or k == "compiled fsdp1"}


def equal_on_all(tensor: Tensor) -> bool:
    lowest, highest = tensor.clone(), tensor.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return torch.equal(lowest, highest)


def moments_of(recorder: GradientRecorder) -> dict[str, Tensor]:
    assert recorder.moments is not None
    return {n: m.sum for n, m in recorder.moments._moments.items()}  # type: ignore[attr-defined]


def digest(codec: Subspace) -> Tensor:
    return torch.frombuffer(bytearray(codec.digest), dtype=torch.uint8).clone()


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    # FSDP averages in another order than the run without it: a few units in the last place.
    assert list(found) == list(wanted) == NAMES, what
    for name, t in wanted.items():
        scale = float(t.abs().max())
        assert scale > 0
        assert float((found[name] - t).abs().max()) <= 2e-5 * scale, (what, name)


# -- cases -------------------------------------------------------------------------------------


def names_are_plain(rank: int, world: int) -> None:
    for kind, make in WRAPPED.items():
        if "flat" not in kind:
            assert list(named_parameters(make())) == NAMES, kind


def gradients_are_whole_and_equal(rank: int, world: int) -> None:
    reference = make_model()
    with GradientRecorder(reference, CONFIG) as expected:
        train_on_all(reference, world)
    assert expected.moments is not None
    wanted = fit_subspace(expected.moments)
    for kind, make in TRAINED.items():
        model = make()
        with GradientRecorder(model, CONFIG) as recorder:
            train(model, rank)
        assert recorder.spec == expected.spec, kind
        assert recorder.moments is not None
        assert recorder.moments.count == expected.moments.count == 4
        close(moments_of(recorder), moments_of(expected), kind)
        codec = fit_subspace(recorder.moments)
        assert equal_on_all(digest(codec)), kind
        for (name, (axis, u)), (_, (_, v)) in zip(
            codec.bases().items(), wanted.bases().items(), strict=True
        ):
            # The same subspace, whatever signs.
            away = float((u @ (u.T @ v) - v).norm())
            assert away < 1e-3 * v.shape[1] ** 0.5, (kind, name, axis)


def an_optimiser_that_shards_its_state_is_recorded_once_a_step(rank: int, world: int) -> None:
    """Its ranks each step a part of the parameters, by an optimiser inside."""
    reference = make_model()
    with GradientRecorder(reference, CONFIG) as expected:
        train_on_all(reference, world)
    model = DDP(make_model())
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=torch.optim.SGD, lr=0.1, momentum=0.9
    )
    with GradientRecorder(model, CONFIG) as recorder:
        train(model, rank, optimizer)
    close(moments_of(recorder), moments_of(expected), "zero")


def updates_and_states_are_whole(rank: int, world: int) -> None:
    reference = make_model()
    start = {n: p.detach().clone() for n, p in reference.named_parameters()}
    train_on_all(reference, world)
    end = {n: p.detach() for n, p in reference.named_parameters()}
    for kind, make in TRAINED.items():
        for representation in ("update", "state"):
            with tempfile.TemporaryDirectory() as folder:
                store = SnapshotStore(folder)
                model = make()
                with GradientRecorder(model, snapshots=store, representation=representation):
                    train(model, rank)
                    if "compiled" not in kind:  # torch cannot compile FSDP1 under no_grad
                        with torch.no_grad():
                            model(batches(rank)[0])  # as an evaluation does, at the end
                (found,) = SnapshotStore(folder)
            wanted = {n: end[n] - start[n] for n in end} if representation == "update" else end
            close({n: found[n] for n in NAMES}, wanted, f"{kind}, {representation}")
            for name in NAMES:  # a file's tensors come in any order, another on each rank
                assert equal_on_all(found[name]), kind


def one_rank_alone_keeps_the_statistics(rank: int, world: int) -> None:
    for make in (fsdp2, WRAPPED["fsdp1"]):
        model = make()
        with GradientRecorder(model, CONFIG if rank == 0 else None) as recorder:
            train(model, rank)
        assert (recorder.moments is None) == (rank != 0)
        assert recorder.steps == 4


def frozen_unused_and_clipped(rank: int, world: int) -> None:
    for use_orig_params in (True, None):
        model = make_model()
        model[0].requires_grad_(False)
        extra = nn.Linear(WIDTH, WIDTH)
        model.append(extra)
        model.forward = lambda x, m=model: m[3](m[2](m[1](m[0](x))))  # type: ignore[method-assign]
        if use_orig_params is None:
            wrapped: nn.Module = fully_shard(model)
        else:
            wrapped = FSDP(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
        with GradientRecorder(wrapped, CONFIG) as recorder:
            (100 * loss_of(wrapped, batches(rank)[0])).backward()
            if use_orig_params is None:
                nn.utils.clip_grad_norm_(wrapped.parameters(), 0.5)
            else:
                wrapped.clip_grad_norm_(0.5)
            optimizer.step()
        assert [t.name for t in recorder.spec] == [*NAMES[2:], "4.weight", "4.bias"]
        found = moments_of(recorder)
        assert not found["4.weight"].any()
        energy = sum(float(m.trace()) for m in found.values())
        assert abs(energy - 0.25) < 1e-4, energy


def low_precision_and_two_meshes(rank: int, world: int) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
    for options in ({"mp_policy": policy}, {"mesh": mesh}):
        model = fsdp2(**options)
        with GradientRecorder(model, CONFIG) as recorder:
            train(model, rank)
        for moment in moments_of(recorder).values():
            assert moment.any()
            assert equal_on_all(moment)


def a_value_that_is_not_finite_stops_every_rank(rank: int, world: int) -> None:
    for make in (fsdp2, WRAPPED["fsdp1"], WRAPPED["fsdp1 flat"]):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recorder = GradientRecorder(model, CONFIG)
        x = batches(rank)[0]
        loss_of(model, x).backward()
        if rank == 0:  # the other rank's part is finite
            first = next(p for p in model.parameters() if p.grad is not None and p.grad.numel())
            local = first.grad.to_local() if hasattr(first.grad, "to_local") else first.grad
            local.view(-1)[0] = torch.nan
        with pytest.raises(NonFiniteError), recorder:
            optimizer.step()
        assert recorder.moments is not None
        assert recorder.moments.count == 0


def what_cannot_be_known_is_refused(rank: int, world: int) -> None:
    for use_orig_params in (True, False):
        model = fsdp1(use_orig_params)
        with pytest.raises(ConfigError, match="outermost"):
            GradientRecorder(dict(model.named_parameters()), CONFIG)
        for inside in (model.module, model.module[0]):
            with pytest.raises(ConfigError, match="outermost"):
                GradientRecorder(inside, CONFIG)


def the_latent_optimizer_takes_whole_parameters_only(rank: int, world: int) -> None:
    codec = Identity().bind(UpdateSpec.of(dict(make_model().named_parameters())))
    for kind, make in WRAPPED.items():
        model = make()
        if "ddp" in kind:
            optimizer = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.01)
            train(model, rank, optimizer)
            assert equal_on_all(optimizer.code), kind
            assert optimizer.code.any()
            continue
        with pytest.raises(ConfigError, match=r"sharded by .* DistributedDataParallel"):
            LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.01)


def parameters_sharded_after_construction_are_noticed(rank: int, world: int) -> None:
    model = make_model()
    codec = Identity().bind(UpdateSpec.of(dict(model.named_parameters())))
    optimizer = LatentOptimizer(model, codec, torch.optim.AdamW, lr=0.01)
    fully_shard(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())  # what accelerate does
    loss_of(model, batches(rank)[0]).backward()
    with pytest.raises(ConfigError, match="after wrapping, sharding"):
        optimizer.step()


def recorders_can_be_copied_with_their_model(rank: int, world: int) -> None:
    model = DDP(make_model())
    recorder = GradientRecorder(model, CONFIG)
    with recorder:
        train(model, rank)
    other, its = copy.deepcopy((model.module, recorder))
    with its:
        train(other, rank)
    assert its.moments is not None
    assert recorder.moments is not None
    assert (its.moments.count, recorder.moments.count) == (8, 4)
