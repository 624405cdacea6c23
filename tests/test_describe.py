"""What the charts of ``inspect`` count, and how they are drawn as text."""

import math

import pytest
import torch
from conformance import CASES, Case, mixed, model
from torch import Tensor

from gradcodec.codecs import Subspace
from gradcodec.describe import Chart, Row, draw
from gradcodec.describe.allocation import allocation, body_bytes, code_values
from gradcodec.describe.bars import bar, marks
from gradcodec.describe.kinds import kinds, labels
from gradcodec.describe.spectrum import bases, effective_rank, energies, spectrum
from gradcodec.errors import UpdateError
from gradcodec.registry import make_codec
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import TensorSpec, UpdateSpec

SPEC = UpdateSpec(tuple(TensorSpec(f"l.{i}.w", (8, 4)) for i in range(11)))


def subspace(*bases: Tensor) -> Subspace:
    """A codec of layers with these bases ``[8, k]``."""
    spec = UpdateSpec(SPEC.tensors[: len(bases)])
    made = {t.name: (Axis(True, 8, 4), u) for t, u in zip(spec, bases, strict=True)}
    return Subspace.from_bases(SubspaceConfig(ratio=4, basis_dtype="float32"), spec, made)


# -- allocation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_the_tensors_of_every_codec_share_its_whole_code_and_body(case: Case) -> None:
    update = mixed() if case.any_dtype else model()
    codec, spec = case.for_(update), UpdateSpec.of(update)
    values, sizes = code_values(codec.transform, spec), body_bytes(codec, spec)
    if not codec.linear:  # networks mix all tensors
        assert values is sizes is allocation(codec, spec) is None
        return
    assert values is not None
    assert sizes is not None
    assert list(values) == list(sizes) == list(update)
    assert sum(values.values()) == codec.code_numel(spec)
    assert sum(sizes.values()) == pytest.approx(codec.nbytes(spec), rel=1e-9)


def test_the_allocation_is_of_the_codecs_own_table() -> None:
    bound = make_codec("int4").bind(SPEC)
    with pytest.raises(UpdateError, match="another tensor table"):
        allocation(bound, UpdateSpec(SPEC.tensors[:2]))


# -- kinds -----------------------------------------------------------------------------------------


def test_a_kind_holds_its_layers_in_the_order_of_their_numbers() -> None:
    by_text = UpdateSpec(tuple(sorted(SPEC, key=lambda t: t.name)))
    assert kinds(by_text) == {"l.*.w": [f"l.{i}.w" for i in range(11)]}


def test_a_tensor_that_is_alone_keeps_its_name() -> None:
    spec = UpdateSpec((TensorSpec("0.weight", (4, 8)), TensorSpec("2.weight", (2, 4))))
    assert kinds(spec) == {"0.weight": ["0.weight"], "2.weight": ["2.weight"]}


def test_each_tensor_can_be_a_kind() -> None:
    assert list(kinds(SPEC, each=True)) == [t.name for t in SPEC]


@pytest.mark.parametrize(
    ("names", "short", "left_out"),
    [
        (["a.q.w", "a.k.w"], ["q", "k"], "a.<name>.w"),
        (["a.q", "a.q.b"], ["q", "q.b"], "a.<name>"),
        (["q", "k"], ["q", "k"], ""),
        (["a.w"], ["a.w"], ""),
        (["w", "a.w"], ["w", "a.w"], ""),
    ],
)
def test_labels_leave_out_what_all_names_share(
    names: list[str], short: list[str], left_out: str
) -> None:
    assert labels(names) == (dict(zip(names, short, strict=True)), left_out)


# -- spectra ---------------------------------------------------------------------------------------


def test_energies_are_those_of_the_singular_values() -> None:
    q = torch.linalg.qr(torch.randn(6, 3, dtype=torch.float64)).Q
    matrix = q * torch.tensor([3.0, 2.0, 1.0])
    assert energies(matrix).tolist() == pytest.approx([9 / 14, 4 / 14, 1 / 14])


def test_energies_of_nothing_are_zero() -> None:
    assert energies(torch.zeros(3, 2)).tolist() == [0, 0]


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_effective_rank_of_equal_directions_is_their_number(rank: int) -> None:
    q = torch.linalg.qr(torch.randn(9, rank, dtype=torch.float64)).Q
    assert effective_rank(7 * q) == pytest.approx(rank, rel=1e-12)


def test_vectors_and_integers_have_no_spectrum() -> None:
    update = {"v": torch.randn(5), "n": torch.ones(4, 4, dtype=torch.int64)}
    assert spectrum(update) is None


def test_the_spectrum_of_huge_fp64_values_is_that_of_small_ones() -> None:
    matrix = torch.randn(5, 4, dtype=torch.float64)
    small, huge = spectrum({"w": matrix}), spectrum({"w": 1e300 * matrix})
    assert small is not None
    assert huge is not None
    assert huge.rows[0].cells == pytest.approx(small.rows[0].cells)


def test_layers_with_one_basis_share_all_of_their_directions() -> None:
    u = torch.linalg.qr(torch.randn(8, 3)).Q
    chart = bases(subspace(u, u, u))
    assert chart is not None
    (row,) = chart.rows
    assert row.cells[:3] == pytest.approx([1, 1, 1], abs=1e-6)
    assert row.value == pytest.approx(3, abs=1e-4)


def test_layers_with_orthogonal_bases_share_nothing() -> None:
    q = torch.linalg.qr(torch.randn(8, 8)).Q
    chart = bases(subspace(q[:, :2], q[:, 2:4]))
    assert chart is not None
    (row,) = chart.rows
    assert row.cells == pytest.approx([0.5] * 4, abs=1e-6)
    assert row.value == pytest.approx(4, abs=1e-4)


def test_untrained_codecs_have_no_bases() -> None:
    assert bases(make_codec("int4").bind(SPEC)) is None


# -- text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "drawn"),
    [
        (0, ""),
        (1, "▌"),
        (8, "████"),
        (4.5, "██▎"),
        (1e-9, "▏"),
        (math.inf, "∞"),
        (math.nan, "∞"),
        (99, "████"),
    ],
)
def test_a_bar_is_as_long_as_its_value(value: float, drawn: str) -> None:
    assert bar(value, 8, width=4) == drawn


def test_a_mark_is_as_high_as_its_cell() -> None:
    assert marks([0, 1e-9, 1, 2, 4, 7, 8, math.inf], 8) == "·▁▂▃▅██∞"


def test_two_heights_of_a_mark_are_a_decade_if_logarithmic() -> None:
    assert marks([1, 0.1, 0.01, 1e-3, 1e-4, 0], 1, logarithmic=True) == "█▆▄▂▁·"


def chart(*rows: Row, **more: bool) -> Chart:
    return Chart("title", "values", "cells", "layers", ("n",), rows, **more)


def test_lines_of_a_chart_are_aligned() -> None:
    lines = draw(chart(Row("a", 2, (1, 2), ("1",)), Row("long", 1, (1,), ("1,000",))))
    assert lines[0] == "title"
    assert lines[-2:] == ["  a     ████████████      1  ▅█", "  long  ██████        1,000  ▅"]


def test_many_cells_are_means_of_neighbours() -> None:
    lines = draw(chart(Row("a", 1, (0, 8) * 32, ("1",)), Row("b", 1, (8,) * 64, ("1",))))
    assert "2 to a mark" in lines[2]
    assert lines[-2].endswith("  " + "▅" * 32)
    assert lines[-1].endswith("  " + "█" * 32)


def test_curves_are_drawn_against_their_own_peak() -> None:
    rows = (Row("a", 1, (8, 4), ("1",)), Row("b", 1, (2, 1), ("1",)))
    assert [line[-2:] for line in draw(chart(*rows, curves=True))[-2:]] == ["█▅", "█▅"]
