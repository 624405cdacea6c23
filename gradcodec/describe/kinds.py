"""Tensors of one kind: the same parameter in every layer. They share a line of a chart."""

from __future__ import annotations

from collections.abc import Sequence

from gradcodec.transforms.subspace.groups import groups
from gradcodec.types import UpdateSpec


def kinds(spec: UpdateSpec, each: bool = False) -> dict[str, list[str]]:
    """Names of the tensors of each kind, by the kind's name; tensors without elements are left out.

    A kind's name is a tensor's with ``*`` in place of the numbers among its dotted parts. Its
    members are in the order of these numbers: layer 10 follows layer 9, even in a table that is
    sorted by name. A kind of one tensor has that tensor's name.

    Args:
        spec: the tensor table.
        each: make every tensor a kind of its own.
    """
    found = groups(spec, "none" if each else "kind")
    return {
        kind if len(names) > 1 else names[0]: sorted(names, key=_numbers)
        for kind, names in found.items()
    }


def labels(kinds: Sequence[str]) -> tuple[dict[str, str], str]:
    """Short printable names of kinds, and what was left out of them.

    Returns:
        The label of each kind, without the dotted parts that all of them begin and end with; and
        the pattern that puts them back, such as ``model.layers.*.<name>.weight``.
    """
    parts = [printable(kind).split(".") for kind in kinds]
    if len(parts) < 2:
        return {k: printable(k) for k in kinds}, ""
    head = _common(parts)
    tail = _common([p[::-1] for p in parts])
    # Something is left of the shortest name.
    shortest = min(map(len, parts))
    head = min(head, shortest - 1)
    tail = min(tail, shortest - 1 - head)
    first = parts[0]
    left_out = ".".join([*first[:head], "<name>", *first[len(first) - tail :]])
    short = {
        k: ".".join(p[head : len(p) - tail]) or printable(k)
        for k, p in zip(kinds, parts, strict=True)
    }
    return short, left_out if head or tail else ""


def printable(name: str) -> str:
    """The name with ``?`` for what a terminal might obey; a stranger may have chosen it."""
    return "".join(c if c.isprintable() else "?" for c in name)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A sorting key in which numbers among the dotted parts count as numbers."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in name.split(".")]


def _numbers(name: str) -> list[int]:
    """The numbers among a name's dotted parts."""
    return [int(p) for p in name.split(".") if p.isdecimal()]


def _common(lists: Sequence[Sequence[str]]) -> int:
    """How many items all lists begin with."""
    count = 0
    for items in zip(*lists, strict=False):
        if len(set(items)) > 1:
            break
        count += 1
    return count
