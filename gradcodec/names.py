"""What an error says of a name that is not known: the nearest ones first, then where all are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from gradcodec.encodable import shown

FEW = 10
"""Up to so many names are listed; of more, an error says where they are."""


def wrong_name(what: str, name: object, known: Iterable[str], where: str = "") -> str:
    """The text of an error about a name that is not among the known ones.

        expected a codec name, got 'low-rank'; did you mean 'lowrank'? `gradcodec info` lists all

    Args:
        what: what was expected: ``"a codec name"``.
        name: what came, of any type.
        known: the right names.
        where: where all of them are; without it they are listed, however many.
    """
    names = list(known)
    close = nearest(name, names)
    meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ";"
    rest = where if where and len(names) > FEW else f"there are {', '.join(map(repr, names))}"
    return f"expected {what}, got {shown(name)}{meant} {rest}"


def nearest(name: object, known: Iterable[str], most: int = 3) -> list[str]:
    """The known names that look like ``name``, the nearest first, upper or lower case alike."""
    if not isinstance(name, str):
        return []
    lower = {one.lower(): one for one in known}
    return [lower[one] for one in difflib.get_close_matches(name.lower(), lower, most)]
