"""Laws of the plain collectives, run by every rank of a world; see ``test_collectives.py``."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed.toy import everywhere, relative
from torch import Tensor

from gradcodec.codecs import BlockQuant, Subspace
from gradcodec.distributed import (
    Residuals,
    compressed_all_gather,
    compressed_all_reduce,
    compressed_reduce_scatter,
    scatter_residual_numel,
)
from gradcodec.errors import ConfigError, UpdateError
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import TensorSpec, UpdateSpec

NAMES = ("fp32", "fp16", "bf16", "int8", "int4", "int2", "sign", "topk", "rotsign")

#: Elements: none, one, odd, a block short of and beyond each boundary, no multiple of any world.
SIZES = (0, 1, 7, 63, 4095, 4096, 4097, 12289, 40001)


def values(rank: int, size: int, salt: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(7919 * salt + 31 * rank + size)
    return torch.randn(size, generator=generator)


def exact_mean(world: int, size: int, salt: int = 0) -> Tensor:
    return torch.stack([values(r, size, salt).double() for r in range(world)]).mean(0)


def all_reduce_is_a_mean_and_equal_everywhere(rank: int, world: int) -> None:
    for name in NAMES:
        tensors = [values(rank, n) for n in SIZES]
        traffic = compressed_all_reduce(tensors, name, seed=3)
        assert traffic.dense == 4 * sum(SIZES)
        for n, mean in zip(SIZES, tensors, strict=True):
            assert torch.isfinite(mean).all()
            for other in everywhere(mean):
                assert torch.equal(other, mean), (name, n)
            if name in ("fp32", "fp16", "bf16", "int8"):
                torch.testing.assert_close(mean.double(), exact_mean(world, n), rtol=0, atol=0.08)


def identity_adds_in_rank_order(rank: int, world: int) -> None:
    mine = values(rank, 10001)
    expected = values(0, 10001)
    for r in range(1, world):
        expected += values(r, 10001)
    compressed_all_reduce(mine, "fp32")
    assert torch.equal(mine, expected / world)


def shapes_strides_and_dtypes_are_kept(rank: int, world: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        wide = values(rank, 6000).view(60, 100).to(dtype)
        turned = wide.clone().T
        compressed_all_reduce([wide, turned], "int8")
        assert wide.dtype is dtype
        assert turned.shape == (100, 60)
        expected = exact_mean(world, 6000).view(60, 100)
        assert relative(wide, expected) < 1e-3
        assert relative(turned, expected.T) < 1e-3


def fp64_is_raw_fp64_under_identity(rank: int, world: int) -> None:
    mine = values(rank, 5000).double() * (1 + 1e-12)
    expected = sum(values(r, 5000).double() * (1 + 1e-12) for r in range(world)) / world
    compressed_all_reduce(mine, "fp32")
    torch.testing.assert_close(mine, expected, rtol=1e-15, atol=1e-15)


def results_do_not_depend_on_what_shares_a_message(rank: int, world: int) -> None:
    """Tensor 0 alone and tensor 0 among others: equal bits, so are its residuals."""
    alone, among = Residuals(), Residuals()
    for step in range(3):
        one = values(rank, 9001, step)
        compressed_all_reduce(one, "int4", seed=step, residuals=alone)
        many = [values(rank, 9001, step), values(rank, 5000, step), values(rank, 3)]
        compressed_all_reduce(many, "int4", seed=step, residuals=among)
        assert torch.equal(one, many[0])
    if world > 1:
        assert torch.equal(alone.first["0"], among.first["0"])
        assert torch.equal(alone.second["0"], among.second["0"])


def residuals_carry_over_what_was_lost(rank: int, world: int) -> None:
    """Mean over calls with error feedback goes to the exact one, without it it does not."""
    for name in ("int4", "sign", "int2"):
        found = {}
        for kept in (Residuals(), None):
            total = torch.zeros(9001)
            for step in range(12):
                mine = values(rank, 9001)
                compressed_all_reduce(mine, name, seed=step, residuals=kept)
                total += mine / 12
            found[kept is None] = relative(total, exact_mean(world, 9001))
        if world > 1:
            assert 0 < found[False] < 0.25 * found[True], (name, found)


def residuals_resume_through_their_state(rank: int, world: int) -> None:
    whole = Residuals()
    first = [values(rank, 9001, s) for s in range(4)]
    for step, mine in enumerate(first):
        compressed_all_reduce(mine, "sign", seed=step, residuals=whole)
    parts = Residuals()
    second = [values(rank, 9001, s) for s in range(4)]
    for step, mine in enumerate(second):
        if step == 2:
            kept, parts = parts.state_dict(), Residuals()
            parts.load_state_dict(kept, rank=rank, world=world)
        compressed_all_reduce(mine, "sign", seed=step, residuals=parts)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def residuals_of_other_codecs_are_refused(rank: int, world: int) -> None:
    kept = Residuals()
    compressed_all_reduce(values(rank, 9001), "int4", residuals=kept)
    with pytest.raises(ConfigError, match="another codec or another shape"):
        compressed_all_reduce(values(rank, 5001), "int4", residuals=kept)


def reduce_scatter_gives_the_mean_or_sum_of_my_part(rank: int, world: int) -> None:
    for size in (1, 63, 4097, 9000):
        rows = torch.stack([values(r, world * size).double() for r in range(world)])
        expected = rows.mean(0).view(world, size)[rank]
        for name, atol in (("fp32", 1e-6), ("int8", 0.06)):
            output = torch.zeros(size)
            mine = values(rank, world * size)
            kept = mine.clone()
            compressed_reduce_scatter(output, mine, name)
            torch.testing.assert_close(output.double(), expected, rtol=0, atol=atol)
            assert torch.equal(mine, kept)
            compressed_reduce_scatter(output, mine, name, op="sum")
            torch.testing.assert_close(output.double(), expected * world, rtol=0, atol=atol * world)


def reduce_scatter_is_the_dense_one_under_identity(rank: int, world: int) -> None:
    mine = values(rank, 501 * world)
    ours, theirs = torch.zeros(501), torch.zeros(501)
    compressed_reduce_scatter(ours, mine, "fp32", op="sum")
    dist.reduce_scatter(theirs, list(mine.clone().chunk(world)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def reduce_scatter_feeds_errors_back(rank: int, world: int) -> None:
    size = 5000
    residual = torch.zeros(scatter_residual_numel("sign", size, world))
    total = torch.zeros(size)
    for step in range(12):
        output = torch.zeros(size)
        compressed_reduce_scatter(
            output, values(rank, world * size), "sign", seed=step, residual=residual
        )
        total += output / 12
    rows = torch.stack([values(r, world * size).double() for r in range(world)])
    expected = rows.mean(0).view(world, size)[rank]
    assert relative(total, expected) < 0.06
    with pytest.raises(ConfigError, match="expected a residual of"):
        compressed_reduce_scatter(
            total, values(rank, world * size), "sign", residual=torch.zeros(3)
        )


def all_gather_gives_everyone_the_same(rank: int, world: int) -> None:
    for name in ("fp32", "int8", "rotsign"):
        uneven = [torch.zeros(4096 * (r % 3) + 5) for r in range(world)]
        compressed_all_gather(uneven, values(rank, uneven[rank].numel()), name, seed=2)
        joined = torch.cat(uneven)
        for other in everywhere(joined):
            assert torch.equal(other, joined)
        if name != "rotsign":
            for r, came in enumerate(uneven):
                torch.testing.assert_close(came, values(r, came.numel()), rtol=0, atol=0.03)
    flat, dense = torch.zeros(100 * world), torch.zeros(100 * world)
    compressed_all_gather(flat, values(rank, 100), "fp32")
    dist.all_gather(list(dense.chunk(world)), values(rank, 100))
    assert torch.equal(flat, dense)


def what_is_not_finite_arrives_and_the_rest_is_coded(rank: int, world: int) -> None:
    for name in NAMES:
        kept = Residuals()
        tensors = [values(rank, 13000), values(rank, 4096)]
        if rank == world - 1:
            tensors[0][5000] = float("nan")
            tensors[0][5001] = float("inf")
        compressed_all_reduce(tensors, name, residuals=kept)
        bad = (~torch.isfinite(tensors[0])).nonzero().flatten().tolist()
        assert bad == [5000, 5001], name
        assert torch.isfinite(tensors[1]).all()
        for other in everywhere(tensors[0].nan_to_num(9.0)):
            assert torch.equal(other, tensors[0].nan_to_num(9.0))
        for t in (*kept.first.values(), *kept.second.values()):
            assert torch.isfinite(t).all(), name


def huge_values_do_not_break_residuals(rank: int, world: int) -> None:
    """The sum of finite values may overflow: the owner then says so and sends what it has."""
    for name in ("int8", "bf16", "fp16", "int8-rotated", "gauss4-64"):
        kept = Residuals()
        for step in range(2):
            mine = torch.full((5000,), 3e38)
            compressed_all_reduce(mine, name, seed=step, residuals=kept)
        for t in (*kept.first.values(), *kept.second.values()):
            assert torch.isfinite(t).all(), name


def wrong_arguments_are_refused(rank: int, world: int) -> None:
    with pytest.raises(UpdateError, match="dense floating"):
        compressed_all_reduce(torch.zeros(3, dtype=torch.int64), "int4")
    with pytest.raises(UpdateError, match="dense floating"):
        compressed_all_reduce(torch.eye(3).to_sparse(), "int4")
    with pytest.raises(ConfigError, match="op of"):
        compressed_reduce_scatter(torch.zeros(1), torch.zeros(world), "int4", op="max")
    with pytest.raises(UpdateError, match="expected an input of"):
        compressed_reduce_scatter(torch.zeros(2), torch.zeros(2 * world + 1), "int4")
    with pytest.raises(UpdateError, match="expected outputs"):
        compressed_all_gather(torch.zeros(2), torch.zeros(3), "int4")
    with pytest.raises(UpdateError, match="contiguous"):
        compressed_reduce_scatter(torch.zeros(2), torch.zeros(2 * world, 2)[:, 0], "int4")
    assert compressed_all_reduce([], "int4").dense == 0


def a_learned_codec_averages_codes(rank: int, world: int) -> None:
    spec = UpdateSpec((TensorSpec("a", (80, 60)), TensorSpec("b", (50, 90))))
    config = SubspaceConfig(ratio=8, basis_dtype="float32")
    generator = torch.Generator().manual_seed(0)
    bases = {}
    for t in spec:
        axis = Axis.choose(t, config)
        bases[t.name] = (axis, torch.linalg.qr(torch.randn(axis.size, 6, generator=generator)).Q)
    codec = Subspace.from_bases(config, spec, bases)
    a, b = values(rank, 4800).view(80, 60), values(rank, 4500).view(50, 90)
    traffic = compressed_all_reduce([a, b], codec)
    means = {
        "a": exact_mean(world, 4800).view(80, 60).float(),
        "b": exact_mean(world, 4500).view(50, 90).float(),
    }
    expected = codec.from_code(codec.to_code(means)) if world > 1 else means
    assert relative(a, expected["a"]) < 1e-10
    assert relative(b, expected["b"]) < 1e-10
    assert traffic.wire <= 2 * 4 * codec.code_numel(spec) * world
    with pytest.raises(ConfigError, match="expected the 2 tensors"):
        compressed_all_reduce([a], codec)
    with pytest.raises(ConfigError, match="needs no tensor table"):
        compressed_reduce_scatter(torch.zeros(2), torch.zeros(2 * world), codec)


def bytes_on_the_wire_are_the_codecs_bytes(rank: int, world: int) -> None:
    size = 4096 * world
    traffic = compressed_all_reduce(values(rank, size), "int4")
    body = BlockQuant(BlockQuantConfig(4)).packer.nbytes(4096)
    # To every other rank what is agreed on, its part, and my mean; a header of 8 bytes each, 16 in
    # shot one from W=4.
    least = (world - 1) * (2 * body + 48)
    assert least <= traffic.wire <= least + 32 * (world - 1)


def sub_groups_work_alone(rank: int, world: int) -> None:
    groups = [dist.new_group([r, (r + 1) % world]) for r in range(0, world - world % 2, 2)]
    if rank < 2 * len(groups):
        group = groups[rank // 2]
        mine = values(rank, 5000)
        compressed_all_reduce(mine, "int8", group)
        low = rank - rank % 2
        expected = (values(low, 5000) + values(low + 1, 5000)) / 2
        assert relative(mine, expected) < 1e-3
    elif world > 2:
        with pytest.raises(ConfigError, match="member"):
            compressed_all_reduce(values(rank, 5), "int8", groups[0])
