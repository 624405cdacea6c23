"""Which parameter is coded how: rules, then size, then the default."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

from gradcodec.codecs.base import Codec
from gradcodec.distributed.checks import check_count
from gradcodec.distributed.lowrank import LowRank
from gradcodec.distributed.routes import RAW, Route, flat_route, named_codec, routes
from gradcodec.errors import ConfigError

Choice = Codec | LowRank | str
"""A codec, a name of ``make_codec``, ``LowRank(...)`` or ``"lowrank"``."""

Rules = Sequence[tuple[str, Choice]]


class Policy:
    """A route for every parameter, fixed before the first step.

    Args:
        shapes: all parameters.
        codec: the default.
        min_numel: parameters with fewer elements are sent raw, unless a rule names them.
        rules: ``(pattern, choice)``; shell patterns over names, the first that matches wins.

    Raises:
        ConfigError: a pattern matches no parameter, or a codec cannot serve what it is given.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        codec: Choice,
        min_numel: int,
        rules: Rules,
    ) -> None:
        check_count("min_numel", min_numel)
        for choice in (codec, *(choice for _, choice in rules)):
            if not isinstance(choice, LowRank) and choice != "lowrank":
                named_codec(choice)  # raises for what is neither a codec nor its name
        for pattern, _ in rules:
            if not fnmatch.filter(shapes, pattern):
                some = ", ".join(list(shapes)[:5])
                raise ConfigError(f"rule {pattern!r} matches no parameter; there are {some}, ...")
        chosen: dict[str, Choice | None] = {}
        for name, shape in shapes.items():
            named = [c for pattern, c in rules if fnmatch.fnmatchcase(name, pattern)]
            small = math.prod(shape) < min_numel
            chosen[name] = named[0] if named else (None if small else codec)
        self.routes: dict[str, Route] = {}
        self.lowrank: dict[str, LowRank] = {}
        for one in {id(c): c for c in chosen.values()}.values():
            mine = {n: shapes[n] for n, c in chosen.items() if c is one}
            self._assign(one, mine)

    def _assign(self, choice: Choice | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
        if choice == "lowrank":
            choice = LowRank()
        if choice is None:
            self.routes.update(dict.fromkeys(shapes, RAW))
        elif isinstance(choice, LowRank):
            code, other = _flat(choice.code), _flat(choice.other)
            for name, shape in shapes.items():
                serves = choice.serves(shape)
                self.routes[name] = code if serves else other
                if serves:
                    self.lowrank[name] = choice
        else:
            self.routes.update(routes(choice, shapes))

    @property
    def exact(self) -> bool:
        """Whether nothing is coded."""
        coded = any(r.coder is not None or r.projection is not None for r in self.routes.values())
        return not coded and not self.lowrank

    def labels(self) -> dict[str, str]:
        """How each parameter travels, for people."""
        return {
            name: f"lowrank {self.lowrank[name].rank}, {route.label}"
            if name in self.lowrank
            else route.label
            for name, route in self.routes.items()
        }


def _flat(name: str) -> Route:
    return flat_route(named_codec(name), name)
