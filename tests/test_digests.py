"""Digests of tables and states: equal ones are of equal tables; what was published stays."""

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradcodec import wire
from gradcodec.encodable import DTYPE_CODES
from gradcodec.federated.replica import state_digest
from gradcodec.types import TensorSpec, UpdateSpec

PIECES = ("a", "b", "\0", "\n", "\0()\x001\n", " 00\n")
"""What names are made of: letters, separators, and the end of a whole row."""
NAMES = ["".join(p) for n in range(4) for p in itertools.product(PIECES, repeat=n)]
NASTY = st.lists(st.sampled_from([*PIECES, "(", ",", "2", " ", "é", "\r"]), max_size=5).map("".join)
TABLES = st.lists(
    st.builds(
        TensorSpec,
        NASTY,
        st.lists(st.integers(0, 12), max_size=3).map(tuple),
        st.sampled_from(list(DTYPE_CODES)),
    ),
    max_size=4,
    unique_by=lambda t: t.name,
).map(lambda tensors: UpdateSpec(tuple(tensors)))


def as_published(table: UpdateSpec) -> bytes:
    """The digest of version 1, for all tables."""
    rows = "\n".join(f"{t.name}\0{t.shape}\0{DTYPE_CODES[t.dtype]}" for t in table)
    return hashlib.sha256(rows.encode()).digest()[:8]


def small_tables() -> list[tuple[str, ...]]:
    """Names of all tables of up to two scalars whose names are of few pieces."""
    pairs = itertools.permutations([n for n in NAMES if len(n) <= 7], 2)
    return [(), *((n,) for n in NAMES), *itertools.islice(pairs, 40_000)]


def scalars(names: Sequence[str]) -> UpdateSpec:
    return UpdateSpec(tuple(TensorSpec(n, ()) for n in names))


def test_the_tables_of_the_report_have_two_digests() -> None:
    one = UpdateSpec((TensorSpec("a\0(0,)\x001\nb", (2,)),))
    two = UpdateSpec((TensorSpec("a", (0,)), TensorSpec("b", (2,))))
    assert as_published(one) == as_published(two)
    assert one.digest != two.digest


def test_no_two_of_many_tables_share_a_digest() -> None:
    found: dict[bytes, list[tuple[str, ...]]] = defaultdict(list)
    old = set()
    tables = small_tables()
    for names in tables:
        table = scalars(names)
        found[table.digest].append(names)
        old.add(as_published(table))
    assert [names for names in found.values() if len(names) > 1] == []
    assert len(old) < len(tables)  # where version 1 confused some


@given(TABLES, TABLES)
def test_equal_digests_are_of_equal_tables(one: UpdateSpec, other: UpdateSpec) -> None:
    assert (one.digest == other.digest) == (one == other)


@given(TABLES)
def test_tables_of_plain_names_keep_the_published_digest(table: UpdateSpec) -> None:
    plain = UpdateSpec(
        tuple(
            TensorSpec(t.name.translate({0: "0", 10: "n"}) + f".{i}", t.shape, t.dtype)
            for i, t in enumerate(table)
        )
    )
    assert plain.digest == as_published(plain)


def test_digests_are_those_that_wire_md_describes() -> None:
    plain = UpdateSpec((TensorSpec("w", (2, 3)), TensorSpec("n", (), torch.int64)))
    text = b"w\0(2, 3)\x001\nn\0()\x009"
    assert plain.digest == hashlib.sha256(text).digest()[:8]
    other = UpdateSpec((TensorSpec("w\n", (2,)), TensorSpec("é", (), torch.bool)))
    fields = (b"w\n", b"(2,)", b"1", "é".encode(), b"()", b"10")
    text = b"\n" + b"".join(len(f).to_bytes(8, "little") + f for f in fields)
    assert other.digest == hashlib.sha256(text).digest()[:8]


@pytest.mark.parametrize(
    "shape", [torch.Size([2, 3]), [2, 3], (np.int64(2), np.int32(3)), torch.zeros(2, 3).shape]
)
def test_a_shape_is_its_numbers_whatever_they_come_in(shape) -> None:  # type: ignore[no-untyped-def]
    mine, plain = TensorSpec("w", shape), TensorSpec("w", (2, 3))
    assert (mine, str(mine)) == (plain, str(plain))
    assert UpdateSpec((mine,)).digest == UpdateSpec((plain,)).digest


# -- states ----------------------------------------------------------------------------------------


def test_no_two_of_many_states_share_a_digest() -> None:
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    confused = f"a {wire.tensor_digest(one)}\nb"
    states = [{"a": one, "b": two}, {confused: two}, {"a": one}, {"b": two, "a": one}, {}]
    states += [{n: two} for n in NAMES if n not in ("a", "")]
    assert len({state_digest(state) for state in states}) == len(states)


@given(st.lists(st.text("ab .\r\t", max_size=3), unique=True, max_size=4))
def test_states_of_plain_names_keep_the_published_digest(names: list[str]) -> None:
    state = {n: torch.tensor([float(i)]) for i, n in enumerate(names)}
    sums = "\n".join(f"{n} {wire.tensor_digest(t)}" for n, t in state.items())
    assert state_digest(state) == hashlib.sha256(sums.encode()).digest()[:8]


# -- weights ---------------------------------------------------------------------------------------


def test_a_weights_digest_sees_dtype_shape_and_bits() -> None:
    variants = [
        torch.zeros(2, 3),
        torch.zeros(3, 2),
        torch.zeros(6),
        torch.zeros(6, 1),
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(6, dtype=torch.int32),
        -torch.zeros(6),
        torch.zeros(0),
        torch.zeros(0, 2),
        torch.tensor(0.0),
    ]
    assert len({wire.tensor_digest(t) for t in variants}) == len(variants)
