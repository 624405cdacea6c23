"""How each parameter, or unit of a sharded model, is coded: rules, size, the default codec."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.distributed.checks import check_count
from gradcodec.distributed.coding import (
    RAW,
    Projection,
    Route,
    flat_route,
    named_codec,
    routes_of,
    wants_feedback,
)
from gradcodec.distributed.exchange.terms import choice_text, tensor_text, values_text
from gradcodec.distributed.lowrank import LowRank
from gradcodec.errors import ConfigError

Choice = Codec | LowRank | str
"""A codec, a name of ``make_codec``, ``LowRank(...)`` or ``"lowrank"``."""

Rules = Sequence[tuple[str, Choice]]

_UNBIASED = {"int8": "int8-unbiased", "int4": "int4-unbiased"}


# -- a parameter of DDP ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """How one parameter travels.

    Attributes:
        route: the stages it passes; with low rank, those that its coordinates pass.
        feedback: whether what coding loses is kept for the next step.
        label: name of the codec in ``stats``.
        lowrank: settings of low rank, if it is sent as coordinates in an adaptive basis.
    """

    route: Route
    feedback: bool
    label: str
    lowrank: LowRank | None = None

    @property
    def exact(self) -> bool:
        """Whether it is sent as it is."""
        return self.route.raw and self.lowrank is None

    def terms(self, digests: dict[int, str]) -> str:
        """The text that ranks compare; ``digests`` caches those of bases, which may be shared."""
        parts = [] if self.lowrank is None else [repr(self.lowrank)]
        if self.route.projection is not None:
            parts.append(_projected(self.route.projection, digests))
        if self.route.coder is None:
            return ", ".join([*parts, "sent as it is"])
        parts.append(choice_text(self.route.coder.codec))
        if self.feedback:
            parts.append("with error feedback")
        return ", ".join(parts)


class Plan:
    """An entry for every parameter, fixed before the first step.

    Attributes:
        shapes: of all parameters.
        entries: by name of the parameter.

    Args:
        shapes: of all parameters.
        codec: the default.
        min_numel: parameters with fewer elements are sent raw, unless a rule names them.
        rules: ``(pattern, choice)``; shell patterns over names, the first that matches wins.
        feedback: error feedback: ``True``, ``False``, or ``None`` to decide by codec.

    Raises:
        ConfigError: a pattern matches no parameter, or a codec cannot serve what it is given.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        codec: Choice,
        min_numel: int,
        rules: Rules,
        feedback: bool | None = None,
    ) -> None:
        check_count("min_numel", min_numel)
        _check_choice(codec, "lowrank", "auto")
        for _, choice in rules:
            _check_choice(choice, "lowrank")
        for pattern, _ in rules:
            if not fnmatch.filter(shapes, pattern):
                some = ", ".join(list(shapes)[:5])
                raise ConfigError(f"rule {pattern!r} matches no parameter; there are {some}, ...")
        chosen: dict[str, Choice | None] = {}
        for name, shape in shapes.items():
            named = [c for pattern, c in rules if fnmatch.fnmatchcase(name, pattern)]
            small = math.prod(shape) < min_numel
            chosen[name] = named[0] if named else (None if small else codec)
        self.shapes, self._feedback = dict(shapes), feedback
        found: dict[str, Entry] = {}
        for one in {id(c): c for c in chosen.values()}.values():
            mine = {n: shapes[n] for n, c in chosen.items() if c is one}
            found.update(self._entries(one, mine))
        self.entries = {name: found[name] for name in shapes}

    def _entries(
        self, choice: Choice | None, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Entry]:
        if choice is None:
            return dict.fromkeys(shapes, self._entry(RAW, "fp32"))
        if choice == "lowrank":
            choice = LowRank()
        if isinstance(choice, LowRank):
            code = self._entry(flat_route(named_codec(choice.code)), choice.code)
            other = self._entry(flat_route(named_codec(choice.other)), choice.other)
            label = f"lowrank {choice.rank}, {code.label}"
            low = Entry(code.route, self._feedback is not False, label, choice)
            return {n: low if choice.serves(shape) else other for n, shape in shapes.items()}
        codec = named_codec(choice)
        label = choice if isinstance(choice, str) else str(codec)
        return {
            name: self._entry(route, label if route.projection is None else "subspace")
            for name, route in routes_of(codec, shapes).items()
        }

    def _entry(self, route: Route, label: str) -> Entry:
        if route.raw:
            return Entry(RAW, False, "fp32")
        if self._feedback is not None:
            return Entry(route, self._feedback, label)
        return Entry(route, route.coder is not None and wants_feedback(route.coder.codec), label)

    @property
    def exact(self) -> bool:
        """Whether every parameter is sent as it is."""
        return all(entry.exact for entry in self.entries.values())

    def labels(self) -> dict[str, str]:
        """How each parameter travels, for ``stats``."""
        return {name: entry.label for name, entry in self.entries.items()}

    def terms(self, parameters: Mapping[str, Tensor]) -> dict[str, str]:
        """What ranks compare of every parameter, in order: name, dtype, shape, entry."""
        digests: dict[int, str] = {}
        return {
            f"parameter {i}": f"{name}: {tensor_text(p)}, {self.entries[name].terms(digests)}"
            for i, (name, p) in enumerate(parameters.items())
        }


def _check_choice(choice: Choice, *schemes: str) -> None:
    """Raise ``ConfigError`` for what is neither a codec, nor its name, nor low rank."""
    if not isinstance(choice, LowRank) and choice != "lowrank":
        named_codec(choice, schemes)


def _projected(projection: Projection, digests: dict[int, str]) -> str:
    basis, axis = projection.basis, projection.axis
    if id(basis) not in digests:
        digests[id(basis)] = values_text(basis)
    side = "left" if axis.left else "right"
    return f"projected from the {side} on {digests[id(basis)]}"


# -- a unit of a sharded model --------------------------------------------------------------------


@dataclass(frozen=True)
class UnitCodec:
    """The codec of a unit's gradient, and whether its loss is kept for the next step."""

    codec: Codec
    feedback: bool
    label: str

    def terms(self) -> str:
        """The text that ranks compare."""
        return choice_text(self.codec) + (", with error feedback" if self.feedback else "")


class UnitPlan:
    """A codec for every unit of a sharded model.

    Args:
        codec: the default.
        rules: ``(pattern, codec)``; the first rule decides whose pattern fits the unit's name or
            the names of all its parameters.
        error_feedback: ``True``, ``False`` or ``"auto"``.
        scattered: whether units are reduce-scattered, not all-reduced.

    Attributes:
        substituted: maps names that were asked for to the names of the codecs used instead.
    """

    def __init__(
        self,
        codec: Codec | str,
        rules: Sequence[tuple[str, Codec | str]],
        *,
        error_feedback: bool | str,
        scattered: bool,
    ) -> None:
        self.error_feedback, self.scattered = error_feedback, scattered
        self.substituted: dict[str, str] = {}
        self.default = self._choice(codec)
        self.rules = [(pattern, self._choice(one)) for pattern, one in rules]
        self._unused = [pattern for pattern, _ in self.rules]

    def _choice(self, codec: Codec | str) -> UnitCodec:
        asked = codec
        if self.scattered and self.error_feedback == "auto":
            codec = scattered_codec(codec)
            if codec is not asked:
                self.substituted[str(asked)] = str(codec)
        chosen = named_codec(codec)
        route = flat_route(chosen)  # raises for codecs that cannot code bare vectors
        label = codec if isinstance(codec, str) else str(codec)
        if self.error_feedback == "auto":
            return UnitCodec(chosen, wants_feedback(chosen), label)
        return UnitCodec(chosen, bool(self.error_feedback) and not route.raw, label)

    def codec_of(self, unit: str, parameters: Sequence[str]) -> UnitCodec:
        """The codec of a unit with these parameters, by the rules or else the default."""
        found = []
        for pattern, choice in self.rules:
            all_fit = parameters and all(fnmatch.fnmatchcase(p, pattern) for p in parameters)
            if all_fit or fnmatch.fnmatchcase(unit, pattern):
                found.append(choice)
                self._unused = [p for p in self._unused if p != pattern]
        return found[0] if found else self.default

    def check_used(self, units: Sequence[str]) -> None:
        """Check that every rule fits a unit.

        Raises:
            ConfigError: a rule fits none.
        """
        if self._unused:
            raise ConfigError(
                f"rule {min(self._unused)!r} fits no unit, which takes the unit's name or those of "
                f"all its parameters; there are {', '.join(units[:5])}, ..."
            )

    def terms(self) -> dict[str, str]:
        """What ranks compare."""
        return {
            "codec": self.default.terms(),
            "error_feedback": str(self.error_feedback),
            "rules": ", ".join(f"{p!r}: {choice.terms()}" for p, choice in self.rules),
            "reduces": "scattered" if self.scattered else "to all",
        }


def scattered_codec(codec: Codec | str) -> Codec | str:
    """The codec that a name selects in a reduce-scatter under ``error_feedback="auto"``.

    Error feedback of a reduce-scatter needs memory for the *unsharded* gradient on each rank, which
    undoes the sharding. Hence ``"int8"`` and ``"int4"`` select ``"int8-unbiased"`` and
    ``"int4-unbiased"`` there, which rotate and round at random so that :math:`E[Q(g)] = g`, and no
    residual is kept. ``stats()["substituted"]``, the first log line and every later one say so. To
    get the plain codec, pass it as an object (``make_codec("int4")``) or set ``error_feedback``.
    """
    return _UNBIASED.get(codec, codec) if isinstance(codec, str) else codec
