"""What a codec's settings are, and the checks of their values.

Settings may come from a folder or over the wire, so every value is checked: first its exact type,
then its range. The type must be exact because ``True == 1`` in Python, and the two would give one
setting two digests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from gradcodec.encodable import shown
from gradcodec.errors import ConfigError
from gradcodec.names import wrong_name


@dataclass(frozen=True)
class CodecConfig:
    """Settings of one codec; they are saved with it and hashed into its digest."""

    kind: ClassVar[str]
    LATER: ClassVar[tuple[str, ...]] = ()

    @property
    def learned(self) -> bool:
        """Whether codecs of this config have weights."""
        return False

    @property
    def stages(self) -> int:
        """How deep this config is nested: 1, and 1 more for each config inside another."""
        return 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, ``kind`` included.

        Settings in ``LATER`` were added after codecs with this config had been published. At their
        defaults they are left out, so those codecs keep their digests.
        """
        fields = dataclasses.asdict(self)
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        told = {n: v for n, v in fields.items() if n not in self.LATER or v != defaults[n]}
        return {"kind": self.kind, **told}

    @classmethod
    def of(cls, given: CodecConfig | Mapping[str, Any]) -> Self:
        """A config as it is, or the one of a ``to_dict()``; ``ConfigError`` for another kind's."""
        if isinstance(given, CodecConfig):
            if not isinstance(given, cls):
                raise ConfigError(f"{cls.kind}: expected its config, got {shown(given)}")
            return given
        return cls.from_dict(given)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of ``to_dict``; an unknown or missing key is a ``ConfigError``."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or data.get("kind", cls.kind) != cls.kind:
            raise ConfigError(f"{cls.kind}: expected settings of this kind, got {shown(data)}")
        given = {k: v for k, v in data.items() if k != "kind"}
        unknown = sorted(set(given) - set(fields), key=shown)
        if unknown:
            raise ConfigError(f"{cls.kind}: {wrong_name('a setting', unknown[0], fields)}")
        missing = sorted(
            n
            for n, f in fields.items()
            if n not in given
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        )
        if missing:
            raise ConfigError(f"{cls.kind}: missing keys {missing}")
        return cls(**given)


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
