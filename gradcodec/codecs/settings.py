"""Checks of a config's settings, which may come from a folder or the wire: type first, then range.

Exact types: a ``bool`` is an ``int`` to Python, and ``True`` and ``1`` would be two digests of one
setting.
"""

from __future__ import annotations

from typing import Any

from gradcodec.encodable import shown
from gradcodec.errors import ConfigError


def check_whole(kind: str, name: str, value: Any, low: int, high: int) -> None:
    """Raise ``ConfigError`` unless ``value`` is an int within ``low..high``."""
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(
            f"{kind}: expected {name}, a whole number of {low}..{high}, got {shown(value)}"
        )


def check_number(kind: str, name: str, value: Any, low: float, high: float) -> None:
    """Raise ``ConfigError`` unless ``value`` is an int or float within ``low..high``."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise ConfigError(f"{kind}: expected {name} within {low}..{high}, got {shown(value)}")


def check_one_of(kind: str, name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raise ``ConfigError`` unless ``value`` is one of ``known``, of the same type."""
    if not any(type(value) is type(k) and value == k for k in known):
        raise ConfigError(f"{kind}: expected {name} of {known}, got {shown(value)}")
