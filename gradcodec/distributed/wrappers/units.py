"""What the compressed reductions of a sharded model share: codecs, residuals and counts per unit.

A *unit* is what a wrapper reduces at once: the gradients of one FSDP module as a flat vector. Its
identity is the name of that module, never a length or an order of calls, for the length changes
with the parameters that got gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradcodec.codecs.base import Codec
from gradcodec.codecs.identity import Identity
from gradcodec.distributed.checks import check_settings, check_state, rule_pairs
from gradcodec.distributed.exchange import terms
from gradcodec.distributed.exchange.agreement import Agreed, LinkChannel, alike
from gradcodec.distributed.exchange.collectives import (
    all_reduce,
    reduce_scatter,
    scatter_residual_numel,
)
from gradcodec.distributed.exchange.link import control_link
from gradcodec.distributed.meter import Traffic
from gradcodec.distributed.residuals import Residuals
from gradcodec.distributed.routes import flat_route, named_codec, wants_feedback
from gradcodec.distributed.shards import derive_seed
from gradcodec.errors import ConfigError, NonFiniteError

_log = logging.getLogger(__name__)

DENSE = Identity()
"""Sends values as they are: before ``start_step``, and for small units."""

_UNBIASED = {"int8": "int8-unbiased", "int4": "int4-unbiased"}
_STEPS, _SCATTER, _REDUCE = "steps.", "scatter.", "reduce."
_WORLD, _RANK = "world", "rank"
_MEASURE_EVERY, _MEASURED = 64, 1 << 18


@dataclass
class Unit:
    """One unit's codec and memory.

    Attributes:
        name: of the module, ``"(root)"`` for the model itself.
        codec: what its gradient is coded with.
        feedback: whether what the coding loses is kept for the next step.
        steps: reductions so far.
        traffic: bytes and seconds so far.
        dense_wire: bytes that dense ring reductions would have sent so far.
        scatter: residual of reduce-scatters, fp32; as large as the unsharded unit.
        reduce: residuals of all-reduces.
        partial: reductions of which some parameters were missing, in which residuals waited.
        nmse: relative squared error of the coding, measured now and then on this rank's gradient.
    """

    name: str
    codec: Codec
    feedback: bool
    steps: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    dense_wire: int = 0
    scatter: Tensor | None = None
    reduce: Residuals = field(default_factory=Residuals)
    partial: int = 0
    nmse: float | None = None


class ShardedState:
    r"""State of compressed FSDP1, FSDP2 or HSDP training on one rank; ``compress`` returns one.

    Error feedback of a reduce-scatter needs memory for the *unsharded* gradient on each rank, which
    undoes the sharding. Hence under ``"auto"`` the names ``"int8"`` and ``"int4"`` stand for
    ``"int8-unbiased"`` and ``"int4-unbiased"``, rotated and rounded at random so that
    :math:`E[Q(g)] = g`, and no residual is kept. Other codecs that need error feedback get it, and
    a log line says what it costs. An all-reduce (HSDP's replicas, ``NO_SHARD``) keeps residuals of
    what it reduces, a shard under HSDP, and under ``"auto"`` does so for every codec that is not
    unbiased.

    Args:
        codec: a fixed-rate codec or its name.
        scattered: whether units are reduce-scattered, not all-reduced.
        error_feedback: ``True``, ``False`` or ``"auto"``.
        start_step: the first reductions of each unit that are sent dense.
        min_numel: units with fewer elements are sent dense.
        rules: ``(pattern, codec)`` pairs; the first whose pattern (``fnmatch``) fits a unit's name
            or that of one of its parameters, with all its parameters fitting, decides.
        seed: of stochastic rounding; equal on all ranks.
        log_every: a log line after so many steps, or ``None``.

    Raises:
        ConfigError: an unknown codec, one that needs a tensor table, or a value out of range.
    """

    def __init__(
        self,
        codec: Codec | str = "int4",
        *,
        scattered: bool,
        error_feedback: bool | str = "auto",
        start_step: int = 0,
        min_numel: int = 4096,
        rules: Sequence[tuple[str, Codec | str]] = (),
        seed: int = 0,
        log_every: int | None = None,
    ) -> None:
        check_settings(
            error_feedback=error_feedback,
            seed=seed,
            start_step=start_step,
            min_numel=min_numel,
            log_every=log_every,
        )
        self.scattered, self.error_feedback = scattered, error_feedback
        self.start_step, self.min_numel = start_step, min_numel
        self.seed, self.log_every = seed, log_every
        self.default = self._choice(codec)
        self.rules = [(pattern, self._choice(one)) for pattern, one in rule_pairs(rules)]
        self._unused = {pattern for pattern, _ in self.rules}
        self.units: dict[str, Unit] = {}
        self._agreed = Agreed()
        self.world, self.rank = dist.get_world_size(), dist.get_rank()

    def _choice(self, codec: Codec | str) -> tuple[Codec, bool]:
        """A codec and whether it gets error feedback."""
        if self.scattered and self.error_feedback == "auto" and isinstance(codec, str):
            codec = _UNBIASED.get(codec, codec)
        chosen = named_codec(codec)
        flat_route(chosen)  # raises for codecs that cannot code bare vectors
        if self.error_feedback == "auto":
            return chosen, wants_feedback(chosen)
        return chosen, bool(self.error_feedback) and not isinstance(chosen, Identity)

    def add(self, name: str, parameters: Sequence[str] = ()) -> Unit:
        """Make the unit of a module.

        Args:
            name: of the module.
            parameters: full names of the parameters in the unit; rules are matched with them too.
        """
        codec, feedback = self.default
        fitting = []
        for pattern, choice in self.rules:
            named = bool(parameters) and all(fnmatchcase(p, pattern) for p in parameters)
            if named or fnmatchcase(name, pattern):
                fitting.append(choice)
                self._unused.discard(pattern)
        if fitting:
            codec, feedback = fitting[0]
        unit = self.units[name] = Unit(name, codec, feedback)
        return unit

    def terms(self) -> dict[str, str]:
        """What ranks that reduce with each other must have in common: settings and units.

        Raises:
            ConfigError: a rule fits none of the units.
        """
        if self._unused:
            raise ConfigError(
                f"rule {min(self._unused)!r} fits no unit, which takes the unit's name or those of "
                f"all its parameters; there are {', '.join(list(self.units)[:5])}, ..."
            )
        return {
            "codec": terms.codec_text(*self.default),
            "error_feedback": str(self.error_feedback),
            "start_step": str(self.start_step),
            "min_numel": str(self.min_numel),
            "rules": ", ".join(f"{p!r}: {terms.codec_text(*c)}" for p, c in self.rules),
            "seed": str(self.seed),
            "reduces": "scattered" if self.scattered else "to all",
            **{
                f"unit {i}": f"{u.name}: {terms.codec_text(u.codec, u.feedback)}"
                for i, u in enumerate(self.units.values())
            },
        }

    # -- the two reductions -------------------------------------------------------------------

    def reduce_scatter(
        self,
        unit: Unit,
        output: Tensor,
        input: Tensor,
        group: dist.ProcessGroup,
        *,
        op: str = "mean",
        whole: bool = True,
    ) -> None:
        """This rank's part of the mean (or sum) of ``input`` over ``group``.

        Args:
            unit: whose gradient it is.
            output: ``[n]``.
            input: ``[W n]``, rank-major, of the same dtype.
            group: the sharding ranks.
            op: ``"mean"`` or ``"sum"``.
            whole: whether all of the unit's trainable parameters are in it. Where not, the
                residual, whose elements are those of the whole unit, waits.
        """
        codec = self._codec_now(unit, input.numel())
        residual = None
        if unit.feedback and codec is not DENSE:
            if whole:
                residual = self._scatter_residual(unit, output, group.size())
            else:
                unit.partial += 1
        asked = self._agree(unit, input, group, op, codec)
        self._measure(unit, input, codec)
        traffic = reduce_scatter(
            output,
            input,
            codec,
            group,
            op=op,
            seed=self._seed(unit),
            residual=residual,
            agreed=True,
        )
        world = group.size()
        self._count(unit, traffic + asked, (world - 1) * traffic.dense // world)

    def all_reduce(
        self,
        unit: Unit,
        tensor: Tensor,
        group: dist.ProcessGroup,
        *,
        op: str = "mean",
        whole: bool = True,
    ) -> None:
        """Replace a contiguous tensor by its mean (or sum) over ``group``; ``whole`` as above."""
        codec = self._codec_now(unit, tensor.numel())
        residuals = None
        if unit.feedback and codec is not DENSE:
            if whole:
                residuals = unit.reduce
            else:
                unit.partial += 1
        asked = self._agree(unit, tensor, group, op, codec)
        self._measure(unit, tensor, codec)
        traffic = all_reduce(
            tensor, codec, group, seed=self._seed(unit), residuals=residuals, agreed=True
        )
        world = group.size()
        if op == "sum":
            tensor.mul_(world)
        self._count(unit, traffic + asked, 2 * (world - 1) * traffic.dense // world)

    def _agree(
        self, unit: Unit, values: Tensor, group: dist.ProcessGroup, op: str, codec: Codec
    ) -> Traffic:
        """Before a reduction of another unit, length or kind than there was; what it moved."""
        key = (unit.name, id(group), op, codec.digest, values.numel(), values.dtype)
        if key in self._agreed:
            return Traffic()
        link = control_link(group)
        self._agreed.ensure(
            key,
            link,
            f"the gradients of {unit.name}",
            lambda: {
                "gradient": terms.tensor_text(values),
                "op": op,
                "codec": terms.choice_text(codec),
                "step": str(unit.steps),
                "seed": str(self.seed),
            },
        )
        return link.meter.traffic

    def _codec_now(self, unit: Unit, numel: int) -> Codec:
        if unit.steps < self.start_step or numel < self.min_numel:
            return DENSE
        return unit.codec

    def _seed(self, unit: Unit) -> int:
        return derive_seed(self.seed, *unit.name.encode(), unit.steps)

    def _scatter_residual(self, unit: Unit, like: Tensor, world: int) -> Tensor:
        numel = scatter_residual_numel(unit.codec, like.numel(), world)
        kept = unit.scatter
        if kept is not None and kept.numel() != numel:
            _log.warning(
                "%s: the residual of %d values is dropped, the unit now has %d: its trainable "
                "parameters have changed",
                unit.name,
                kept.numel(),
                numel,
            )
            kept = None
        if kept is None:
            _log.info("%s: error feedback keeps %d fp32 values on each rank", unit.name, numel)
            kept = torch.zeros(numel, device=like.device)
        unit.scatter = kept = kept.to(like.device)
        return kept

    def _measure(self, unit: Unit, values: Tensor, codec: Codec) -> None:
        """Code a sample once more, for ``stats``: 2^18 values every 64 reductions."""
        if codec is DENSE or (unit.nmse is not None and unit.steps % _MEASURE_EVERY):
            return
        sample = values.detach().reshape(-1)[:_MEASURED].float()
        energy = float(sample.square().sum())
        if not 0 < energy < float("inf"):
            return
        try:
            body = codec.pack_flat(sample, seed=self._seed(unit))
        except NonFiniteError:
            return
        lost = sample - codec.unpack_flat(body, sample.numel())
        unit.nmse = float(lost.square().sum()) / energy

    def _count(self, unit: Unit, traffic: Traffic, dense_wire: int) -> None:
        unit.steps += 1
        unit.dense_wire += dense_wire
        unit.traffic += traffic
        first = next(iter(self.units.values()))
        if self.log_every and unit is first and unit.steps % self.log_every == 0:
            total = self.traffic
            _log.info(
                "gradcodec: after %d steps: %.1f MB of gradients, %.2f MB sent by this rank; "
                "seconds: encode %.2f, exchange %.2f, decode %.2f",
                unit.steps,
                total.dense / 1e6,
                total.wire / 1e6,
                total.encode,
                total.exchange,
                total.decode,
            )

    # -- what is reported and kept ------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps so far, of the busiest unit."""
        return max((u.steps for u in self.units.values()), default=0)

    @property
    def traffic(self) -> Traffic:
        """Bytes and seconds of all units so far."""
        total = Traffic()
        for unit in self.units.values():
            total += unit.traffic
        return total

    def stats(self) -> dict[str, Any]:
        """What was moved so far on this rank.

        Returns:
            The keys of ``CompressState.stats``: ``steps`` (of the busiest unit), ``dense_bytes``
            (gradients before coding), ``dense_wire_bytes`` (what dense reductions would have sent),
            ``wire_bytes`` (sent), ``residual_bytes``, ``encode_seconds``, ``exchange_seconds``,
            ``decode_seconds``, ``codecs`` by unit, ``nmse`` by unit (the relative squared error of
            coding the first 2^18 values of this rank's gradient, measured every 64 reductions); and
            ``partial`` by unit: reductions without some of its parameters, in which error feedback
            waited.
        """
        total, units = self.traffic, self.units.values()
        return {
            "steps": self.step,
            "dense_bytes": total.dense,
            "dense_wire_bytes": sum(u.dense_wire for u in units),
            "wire_bytes": total.wire,
            "residual_bytes": sum(_residual_nbytes(u) for u in units),
            "encode_seconds": total.encode,
            "exchange_seconds": total.exchange,
            "decode_seconds": total.decode,
            "codecs": {u.name: str(u.codec) for u in units},
            "nmse": {u.name: u.nmse for u in units if u.nmse is not None},
            "partial": {u.name: u.partial for u in units},
        }

    def state_dict(self) -> dict[str, Tensor | int]:
        """This rank's memory, flat: plain tensors (copies on the CPU) and ints.

        ``world``, ``rank``, ``steps.UNIT``, ``scatter.UNIT`` and ``reduce.UNIT|...``. Residuals are
        those of one rank: save it per rank.
        """
        out: dict[str, Tensor | int] = {_WORLD: self.world, _RANK: self.rank}
        for name, unit in self.units.items():
            out[_STEPS + name] = unit.steps
            if unit.scatter is not None:
                out[_SCATTER + name] = unit.scatter.detach().cpu().clone()
            for key, value in unit.reduce.state_dict().items():
                out[f"{_REDUCE}{name}|{key}"] = value
        return out

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Inverse of ``state_dict``; call it after ``compress``, before the first backward.

        All ranks load, and compare in the next reductions what they have loaded but for residuals.
        Residuals of another rank or world size, which belong to other parts of the model, are
        dropped with a warning: one step's rounding is lost.

        Raises:
            ConfigError: the units of the state are not those of this model.
        """
        check_state(state)
        theirs = {k.removeprefix(_STEPS) for k in state if k.startswith(_STEPS)}
        if theirs != set(self.units):
            raise ConfigError(
                f"expected the state of units {sorted(self.units)}, got {sorted(theirs)}"
            )
        self._agreed.forget()
        world, rank = int(state.get(_WORLD, -1)), int(state.get(_RANK, -1))
        known = (self.world, self.rank)
        same = (world, rank) == known
        if not same:
            _log.warning(
                "residuals of rank %d of %d are dropped: this is rank %d of %d", rank, world, *known
            )
        for name, unit in self.units.items():
            unit.steps = int(state[_STEPS + name])
            kept = state.get(_SCATTER + name) if same else None
            unit.scatter = kept.detach().float().clone() if isinstance(kept, Tensor) else None
            prefix = f"{_REDUCE}{name}|"
            unit.reduce = Residuals()
            inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if same and inner:
                # Of the reducing group, which under HSDP is not the whole world.
                within = {key: int(inner[key]) for key in (_RANK, _WORLD)}
                unit.reduce.load_state_dict(inner, **within)


def agreed_state(
    make: Callable[[], ShardedState], groups: Sequence[dist.ProcessGroup]
) -> ShardedState:
    """A state with its units, compared with those of the ranks that it will reduce with.

    Args:
        make: the state; a refusal of one rank is told to all.
        groups: of the units; each is asked once, in their order.

    Raises:
        AgreementError: ranks came with different settings or units.
    """
    state: ShardedState | None = None
    for group in {id(g): g for g in groups}.values():
        with alike(LinkChannel(control_link(group)), "compress") as mine:
            state = state or make()
            mine.update(state.terms())
    return state or make()


def _residual_nbytes(unit: Unit) -> int:
    return unit.reduce.nbytes + (0 if unit.scatter is None else unit.scatter.nbytes)
