"""How a codec shares its code values and bytes out over the tensors."""

from __future__ import annotations

from gradcodec.codec import Codec
from gradcodec.describe.chart import Chart, Row
from gradcodec.describe.kinds import kinds, labels
from gradcodec.packers.raw import RawPacker
from gradcodec.per_tensor import PartsTransform, PerTensor
from gradcodec.pipeline import TensorPipeline
from gradcodec.transforms.identity import IdentityTransform
from gradcodec.transforms.subspace.transform import SubspaceTransform
from gradcodec.transforms.transform import Transform
from gradcodec.types import UpdateSpec


def code_values(transform: Transform, spec: UpdateSpec) -> dict[str, int] | None:
    """Number of code values of each tensor of ``spec``.

    ``None`` if a code value does not belong to one tensor: networks mix all of them.
    """
    if isinstance(transform, IdentityTransform):
        return {t.name: t.numel for t in spec}
    if isinstance(transform, SubspaceTransform):
        parts = transform.parts
        return {t.name: parts[t.name].code_numel if t.name in parts else 0 for t in spec}
    if isinstance(transform, PartsTransform):
        found: dict[str, int] = {}
        for part in transform.parts:
            its = code_values(part.transform, part.transform.table())
            if its is None:
                return None
            found.update(its)
        return {t.name: found[t.name] for t in spec}
    return None


def body_bytes(codec: Codec, spec: UpdateSpec) -> dict[str, float] | None:
    """Bytes of each tensor of ``spec``; together they are the whole body.

    Exact where each tensor has its own bytes. A packer of the whole code has one body, whose bytes,
    scales and padding included, are shared out in proportion to code values. ``None`` as for
    ``code_values``.
    """
    if isinstance(codec, PerTensor):
        found: dict[str, float] = {}
        for part in codec.parts:
            its = body_bytes(part, part.transform.table())
            if its is None:
                return None
            found.update(its)
        return {t.name: found[t.name] for t in spec}
    packer = codec.packer
    if isinstance(codec.pipeline, TensorPipeline) and isinstance(packer, RawPacker):
        return {t.name: float(t.numel * packer.wire_dtype(t.dtype).itemsize) for t in spec}
    values = code_values(codec.transform, spec)
    if values is None:
        return None
    a_value = codec.nbytes(spec) / max(sum(values.values()), 1)
    return {name: count * a_value for name, count in values.items()}


def allocation(codec: Codec, spec: UpdateSpec, each: bool = False) -> Chart | None:
    """Code values and bytes of each kind of tensor, and of each tensor in it.

    Args:
        codec: any codec; one that is bound must be bound to ``spec``.
        spec: the tensor table.
        each: a line for each tensor instead of each kind.

    Returns:
        A chart whose bars are code values; ``None`` if code values belong to no single tensor.

    Raises:
        UpdateError: the codec is bound to another table.
    """
    codec.transform.table(spec)
    values, sizes = code_values(codec.transform, spec), body_bytes(codec, spec)
    if values is None or sizes is None:
        return None
    elements = {t.name: t.numel for t in spec}
    total = max(sum(sizes.values()), 1.0)
    found = kinds(spec, each)
    short, pattern = labels(list(found))
    rows = []
    for kind, names in found.items():
        count, size = sum(values[n] for n in names), sum(sizes[n] for n in names)
        columns = (
            f"{len(names)}",
            f"{sum(elements[n] for n in names):,}",
            f"{count:,}",
            f"{size:,.0f}",
            f"{size / total:.1%}",
        )
        cells = tuple(float(values[n]) for n in names)
        rows.append(Row(short[kind], float(count), cells, columns))
    some = [c for row in rows for c in row.cells if c > 0]
    return Chart(
        title="allocation of the code" + (f", {pattern}" if pattern else ""),
        measure="code values",
        cell="code values of a tensor",
        across="tensors of the kind, first layer first",
        heads=("tensors", "elements", "code", "bytes", "of all"),
        rows=tuple(rows),
        logarithmic=bool(some) and max(some) > 64 * min(some),
    )
