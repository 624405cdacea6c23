"""A chart before it is drawn: numbers in named rows.

``bars`` draws it as text, ``gradcodec.picture`` as PNG.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of a chart.

    Attributes:
        name: what the line is about; printable.
        value: the one number of the line, drawn as a bar; at least 0, possibly infinite.
        cells: the numbers behind it, at least 0, possibly infinite: one for each tensor of a kind,
            or one for each singular value.
        columns: texts beside it, one for each of the chart's ``heads``.
    """

    name: str
    value: float
    cells: tuple[float, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Chart:
    """Lines that belong together.

    Attributes:
        title: what is shown.
        measure: what ``Row.value`` and the bars count, with its unit.
        cell: what one of ``Row.cells`` is, with its unit.
        across: what the cells of a row run over.
        heads: titles of ``Row.columns``.
        rows: the lines, in the order of the tensor table.
        curves: whether the cells of a row are one curve (a spectrum), to be compared within the
            row; otherwise they are comparable between rows.
        logarithmic: whether values or cells span several orders of magnitude.
    """

    title: str
    measure: str
    cell: str
    across: str
    heads: tuple[str, ...]
    rows: tuple[Row, ...]
    curves: bool = False
    logarithmic: bool = False
