"""Who takes part in a federation: the ids of clients, and how many examples a reply counts for."""

from __future__ import annotations

import operator
from typing import Any

from gradcodec.errors import ConfigError, EmptyClientError

ClientId = int | str
"""A number of 0..2^64 - 1 (a Flower node id is one), or a name of 1..255 bytes of UTF-8."""

MAX_NUMBER = (1 << 64) - 1
MAX_NAME_BYTES = 255
MAX_EXAMPLES = (1 << 63) - 1


def client_id(value: Any) -> ClientId:
    """A client's id as it travels: any integer type becomes ``int``, a name stays ``str``.

    Raises:
        ConfigError: neither a whole number of 0..2^64 - 1 nor a name of 1..255 bytes.
    """
    if isinstance(value, str):
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            size = 0
        if 1 <= size <= MAX_NAME_BYTES:
            return str(value)
    elif not isinstance(value, bool):
        try:
            number = operator.index(value)
        except TypeError:
            number = -1
        if 0 <= number <= MAX_NUMBER:
            return number
    raise ConfigError(
        f"expected a client id of 0..2^64 - 1 or a name of 1..{MAX_NAME_BYTES} bytes, got {value!r}"
    )


def in_order(client: ClientId) -> tuple[bool, int, str]:
    """Sort key: numbers by value, then names, so that the order of arrival does not matter."""
    if isinstance(client, str):
        return True, 0, client
    return False, client, ""


def example_count(value: Any, who: str) -> int:
    """A reply's number of examples: a whole number of at least 1, of any numeric type.

    Raises:
        EmptyClientError: 0 or less.
        ConfigError: not a whole number, or one beyond 2^63 - 1.
    """
    try:
        number = int(value)
        whole = not isinstance(value, bool | str) and number == value
    except (TypeError, ValueError, OverflowError):
        whole = False
    if not whole or number > MAX_EXAMPLES:
        raise ConfigError(f"{who}: expected a whole number of examples, got {value!r}")
    if number < 1:
        raise EmptyClientError(f"{who}: expected at least one example, got {number}")
    return number
