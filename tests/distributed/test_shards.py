"""Shards and owners: fixed functions of the parameter and the number of ranks."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from gradcodec.distributed.shards import ALIGN, derive_seed, first_owner, shard_ranges

NUMELS = st.integers(0, 5_000_000)
WORLDS = st.integers(1, 17)


@given(NUMELS, WORLDS, st.sampled_from([1, 256, ALIGN]))
def test_parts_cover_everything_once_in_order(numel: int, world: int, align: int) -> None:
    parts = shard_ranges(numel, world, align)
    assert len(parts) == world
    assert parts[0][0] == 0
    assert parts[-1][1] == numel
    assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))


@given(NUMELS, WORLDS)
def test_parts_start_at_whole_blocks_and_are_even(numel: int, world: int) -> None:
    parts = shard_ranges(numel, world)
    assert all(start % ALIGN == 0 for start, stop in parts if stop > start)
    blocks = [-(-(stop - start) // ALIGN) for start, stop in parts]
    assert max(blocks) - min(blocks) <= 1


@given(st.text(max_size=30), WORLDS)
def test_the_first_owner_is_a_rank(name: str, world: int) -> None:
    assert 0 <= first_owner(name, world) < world


def test_small_parameters_do_not_all_fall_to_one_rank() -> None:
    owners = [first_owner(f"layers.{i}.bias", 4) for i in range(100)]
    assert all(owners.count(r) > 10 for r in range(4))


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4))
def test_seeds_are_63_bits_and_repeat(numbers: list[int]) -> None:
    seed = derive_seed(*numbers)
    assert 0 <= seed < 2**63
    assert seed == derive_seed(*numbers)


def test_neighbouring_seeds_differ() -> None:
    seeds = {derive_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
