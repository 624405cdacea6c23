"""Lanes: coded in a row is coded each by itself, and residuals follow where they are wanted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, TopK
from gradcodec.distributed.coding import CodecCoder, RawCoder
from gradcodec.distributed.exchange.lanes import Lane, Operand, held_back, lanes_of, side_by_side
from gradcodec.distributed.shards import ALIGN, shard_ranges
from gradcodec.errors import NonFiniteError
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.packers.topk import TopKConfig
from gradcodec.registry import UNTRAINED, make_codec

OTHERS = {
    "topk-3": TopK(TopKConfig(k=3, chunk=512)),
    "topk-rows": TopK(TopKConfig(k=2, chunk=64, structure="rows")),
    "topk-elias-fano": TopK(TopKConfig(index="elias-fano")),
    "int4-of-24": BlockQuant(BlockQuantConfig(4, block=24)),
    "int2-rms": BlockQuant(BlockQuantConfig(2, scale="rms")),
}
CODECS = {**{name: make_codec(name) for name in UNTRAINED}, **OTHERS}
GRAINED = {name: codec for name, codec in CODECS.items() if codec.packer.grain is not None}


def vectors(grain: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(grain)
    out = []
    for size, count in ((1.0, 1), (1e-3, 3), (40.0, 2), (0.0, 1)):
        out.append(size * torch.randn(count * grain, generator=generator))
    return out


def coded(codec: Codec, vector: Tensor, residual: Tensor) -> Tensor:
    for _ in range(2):  # the second time with what the first has lost
        body = codec.packer.pack(vector, seed=3, residual=residual)
    return codec.packer.unpack(body, vector.numel())


@pytest.mark.parametrize("name", GRAINED)
def test_coded_in_a_row_is_coded_each_by_itself(name: str) -> None:
    codec = GRAINED[name]
    assert codec.packer.grain is not None
    parts = vectors(codec.packer.grain * (256 if codec.packer.grain < 256 else 1))
    sizes = [codec.packer.residual_numel(p.numel()) for p in parts]
    together, alone = torch.zeros(sum(sizes)), [torch.zeros(n) for n in sizes]
    row = coded(codec, torch.cat(parts), together)
    assert torch.equal(
        row, torch.cat([coded(codec, p, r) for p, r in zip(parts, alone, strict=True)])
    )
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", GRAINED)
def test_means_in_a_row_are_those_of_each(name: str) -> None:
    codec = GRAINED[name]
    assert codec.packer.grain is not None
    parts = vectors(codec.packer.grain * (256 if codec.packer.grain < 256 else 1))

    def mean(vector: Tensor) -> Tensor:
        bodies = [codec.packer.pack(sign * vector.roll(1), seed=3) for sign in (1.0, -0.3, 0.7)]
        return codec.packer.mean(torch.stack(bodies), vector.numel())

    whole = torch.cat(parts)
    rolled = [
        codec.packer.pack(s * torch.cat([p.roll(1) for p in parts]), seed=3) for s in (1, -0.3, 0.7)
    ]
    assert torch.equal(
        codec.packer.mean(torch.stack(rolled), whole.numel()), torch.cat([mean(p) for p in parts])
    )


def test_dither_and_random_rotations_have_no_grain() -> None:
    """They follow the position in the vector: a row would be another one."""
    assert {name for name in CODECS if CODECS[name].packer.grain is None} == {
        "int8-unbiased",
        "int4-unbiased",
        "int2-unbiased",
        "rotsign",
        "rotsign-quarter",
        "rotsign-eighth",
    }


def operand(numel: int, coder: CodecCoder | RawCoder, owner: int = 0) -> Operand:
    values = torch.arange(numel).float() + 1
    return Operand(values, coder, torch.zeros(numel), first_owner=owner)


INT4 = CodecCoder(make_codec("int4"))


def test_operands_of_whole_blocks_share_a_lane() -> None:
    other = CodecCoder(make_codec("int8"))
    operands = [
        operand(5 * 256, INT4),
        operand(100, INT4),
        operand(512, other),
        operand(256, INT4, 1),
    ]
    made = lanes_of(operands, [shard_ranges(p.values.numel(), 2) for p in operands])
    at = {id(p): k for k, p in enumerate(operands)}
    assert [[at[id(p)] for p in lane.operands] for lane in made] == [[0, 3], [1], [2]]


def test_blocks_that_shards_would_cut_through_do_not_share_a_lane() -> None:
    coder = CodecCoder(BlockQuant(BlockQuantConfig(4, block=3 * ALIGN)))
    assert not operand(6 * ALIGN, coder).shares_lane


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 4)), min_size=1, max_size=5),
    st.integers(1, 5),
)
def test_all_shards_written_are_all_values(sizes: list[tuple[int, int]], world: int) -> None:
    operands = [operand(256 * n, INT4, owner) for n, owner in sizes]
    lane = Lane(operands, [shard_ranges(p.values.numel(), world) for p in operands])
    for owner in range(world):
        if lane.numel(owner):
            lane.write(owner, lane.values(owner), INT4)
    assert all(torch.equal(p.out, p.values) for p in operands)


def test_residuals_move_side_by_side_once() -> None:
    lists = [[torch.full((3,), 1.0)], [torch.zeros(0)], [torch.full((2,), 2.0), torch.ones(4)]]
    whole = side_by_side(lists, [0, 0, 0])
    assert whole.tolist() == [1, 1, 1, 2, 2]
    whole.mul_(3)
    assert lists[2][0].tolist() == [6, 6]
    assert side_by_side(lists, [0, 0, 0]).data_ptr() == whole.data_ptr()


def test_residuals_move_again_when_others_are_beside_them() -> None:
    lists = [[torch.full((3,), 1.0)], [torch.full((2,), 2.0)], [torch.full((1,), 5.0)]]
    side_by_side(lists, [0, 0, 0])
    assert side_by_side([lists[2], lists[0]], [0, 0]).tolist() == [5, 1, 1, 1]
    assert side_by_side(lists, [0, 0, 0]).tolist() == [1, 1, 1, 2, 2, 5]


def test_the_residual_of_an_unused_operand_is_held_back() -> None:
    whole = torch.arange(6.0)
    parts = list(whole.split([2, 4]))
    with held_back(parts, [False, True]):
        assert whole.tolist() == [0, 1, 0, 0, 0, 0]
        whole += 1
    assert whole.tolist() == [1, 2, 2, 3, 4, 5]


def test_a_residual_that_was_held_back_comes_back_if_coding_is_refused() -> None:
    whole = torch.arange(6.0)

    def refuse() -> None:
        with held_back([whole], [True]):
            raise NonFiniteError("as a codec does")

    with pytest.raises(NonFiniteError):
        refuse()
    assert whole.tolist() == [0, 1, 2, 3, 4, 5]
