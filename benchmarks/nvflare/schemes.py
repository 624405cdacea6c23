"""Ways of sending, each as the filters that it adds to a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Apply = Callable[[Any], None]


QUARTER_BIT = {"kind": "rotsign", "block": 256, "kept": 64}


@dataclass(frozen=True)
class Scheme:
    """A way of sending.

    Attributes:
        name: in rows.
        title: in tables.
        apply: adds its filters to a recipe.
        quick: part of the short form.
    """

    name: str
    title: str
    apply: Apply
    quick: bool = True


def _ours(
    name: str,
    up: str | dict[str, Any],
    down: str | None,
    quick: bool = True,
    title: str | None = None,
) -> Scheme:
    def apply(recipe: Any) -> None:
        from gradcodec.integrations.nvflare import compress

        compress(recipe, up, downlink=down)

    return Scheme(name, f"**{title or up} up, {down or 'fp32'} down**", apply, quick)


def _theirs(kind: str, quick: bool = True) -> Scheme:
    def apply(recipe: Any) -> None:
        from benchmarks.nvflare.quantizers import quantize

        quantize(recipe, kind)

    return Scheme(f"nvflare-{kind}", f"NVFLARE's {kind}, both ways", apply, quick)


_ALL = (
    Scheme("fp32", "fp32, no filter", lambda recipe: None),
    _theirs("float16"),
    _theirs("blockwise8", quick=False),
    _theirs("normfloat4"),
    _theirs("adaquant"),
    _ours("int8", "int8", "int8", quick=False),
    _ours("int4-up", "int4", None),
    _ours("int4", "int4", "int4"),
    _ours("int2-rotated", "int2-rotated", "int2-rotated", quick=False),
    _ours("sign-rotated", "sign-rotated", "int4-rotated", quick=False),
    _ours("rotsign", "rotsign", "int4-rotated", quick=False),
    _ours("rotsign-64", QUARTER_BIT, "int4-rotated", quick=False, title="1/4-bit signs"),
)
SCHEMES = {scheme.name: scheme for scheme in _ALL}
