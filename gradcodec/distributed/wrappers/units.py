"""``ShardedState``: the compressed gradients of a model in FSDP1, FSDP2 or HSDP.

A *unit* is what a wrapper reduces at once: the gradients of one FSDP module as a flat vector. It
is identified by the name of that module, never by a length or the order of calls: the length
changes with the parameters that got gradients.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.distributed.checks import check_settings, check_state, rule_pairs
from gradcodec.distributed.coding import DENSE, CodecCoder
from gradcodec.distributed.compression import Closing, State, closed_error
from gradcodec.distributed.exchange.agreement import Agreed, LinkChannel, must_agree
from gradcodec.distributed.exchange.collectives import (
    all_reduce,
    reduce_scatter,
    scatter_residual_numel,
)
from gradcodec.distributed.exchange.link import control_link
from gradcodec.distributed.exchange.terms import choice_text, tensor_text
from gradcodec.distributed.meter import Counters, Traffic, ring_nbytes
from gradcodec.distributed.plan import UnitCodec, UnitPlan
from gradcodec.distributed.residuals import Residuals
from gradcodec.distributed.shards import derive_seed
from gradcodec.distributed.wrappers.behind import Behind
from gradcodec.errors import ConfigError, NonFiniteError

_log = logging.getLogger(__name__)

_STEPS, _SCATTER, _REDUCE = "steps.", "scatter.", "reduce."
_WORLD, _RANK = "world", "rank"
_MEASURE_EVERY, _MEASURED = 64, 1 << 18


@dataclass
class Unit:
    """One unit's codec and memory.

    Attributes:
        name: of the module, ``"(root)"`` for the model itself.
        coding: the codec of its gradient.
        steps: reductions so far.
        scatter: residual of reduce-scatters, fp32; as large as the unsharded unit.
        reduce: residuals of all-reduces.
        partial: reductions that lacked some parameters; residuals were not used in them.
        nmse: relative squared error of the coding, measured now and then on this rank's gradient.
    """

    name: str
    coding: UnitCodec
    steps: int = 0
    scatter: Tensor | None = None
    reduce: Residuals = field(default_factory=Residuals)
    partial: int = 0
    nmse: float | None = None

    @property
    def nbytes(self) -> int:
        """Memory of its residuals."""
        return self.reduce.nbytes + (0 if self.scatter is None else self.scatter.nbytes)


class ShardedState(Closing):
    """The ``Compression`` of an FSDP1, FSDP2 or HSDP model on one rank; ``compress`` returns it.

    A reduce-scatter under ``error_feedback="auto"`` uses unbiased codecs in place of ``"int8"`` and
    ``"int4"``, and keeps no residual; ``plan.scattered_codec`` says why. Other codecs that need
    error feedback get it, and a log line states its memory. An all-reduce (HSDP's replicas,
    ``NO_SHARD``) keeps residuals of the size of what it reduces, which under HSDP is a shard; under
    ``"auto"`` it does so for every codec that needs it (``coding.wants_feedback``).

    Args:
        codec: a fixed-rate codec or its name.
        scattered: whether units are reduce-scattered, not all-reduced.
        error_feedback: ``True``, ``False`` or ``"auto"``.
        start_step: number of first reductions of each unit that are sent dense.
        min_numel: units with fewer elements are sent dense.
        rules: ``(pattern, codec)`` pairs; the first rule decides whose pattern (``fnmatch``) fits
            the unit's name or the names of all its parameters.
        seed: of stochastic rounding; equal on all ranks.
        log_every: steps between log lines, or ``None``.

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
        self.start_step, self.min_numel, self.seed = start_step, min_numel, seed
        self.plan = UnitPlan(
            codec, rule_pairs(rules), error_feedback=error_feedback, scattered=scattered
        )
        self.counters = Counters(log_every, self.plan.substituted)
        self.units: dict[str, Unit] = {}
        self._dense_wire = 0
        self._agreed = Agreed()
        self._behind: dict[int, Behind] = {}
        self.world, self.rank = dist.get_world_size(), dist.get_rank()

    def add(self, name: str, parameters: Sequence[str] = ()) -> Unit:
        """Make the unit of a module.

        Args:
            name: name of the module.
            parameters: full names of the parameters in the unit; rules are matched with them too.
        """
        unit = self.units[name] = Unit(name, self.plan.codec_of(name, parameters))
        return unit

    def terms(self) -> dict[str, str]:
        """What ranks that reduce with each other must have in common: settings and units.

        Raises:
            ConfigError: a rule fits none of the units.
        """
        self.plan.check_used(list(self.units))
        return {
            **self.plan.terms(),
            "start_step": str(self.start_step),
            "min_numel": str(self.min_numel),
            "seed": str(self.seed),
            **{
                f"unit {i}": f"{unit.name}: {unit.coding.terms()}"
                for i, unit in enumerate(self.units.values())
            },
        }

    # -- reductions behind the backward pass ---------------------------------------------------

    def reduce_behind(self, groups: Sequence[dist.ProcessGroup]) -> None:
        """Leave the reductions over these groups to workers; all ranks call it together."""
        for group in groups:
            if id(group) not in self._behind and group.size() > 1:
                behind = self._behind[id(group)] = Behind(group)
                weakref.finalize(self, behind.turns.stop)

    def _submit(
        self,
        unit: Unit,
        values: Tensor,
        output: Tensor,
        group: dist.ProcessGroup,
        op: str,
        work: Callable[[Tensor, dist.ProcessGroup], None],
        late: Sequence[float],
    ) -> None:
        """Let ``work`` write into ``output``: here, or by a worker behind the backward pass."""
        behind = self._behind.get(id(group))
        if behind is None:
            work(output, group)
            return
        if not late:
            behind.finish()  # the unit may be under way

        def reduced(sister: dist.ProcessGroup) -> Tensor:
            own = torch.empty_like(output)
            work(own, sister)
            return own

        key = self._key(unit, values, op, self._codec_now(unit, values.numel()))
        behind.reduce(key, output, reduced, late=bool(late), factors=late)

    def close(self) -> None:
        """End the compression and its threads."""
        super().close()
        for behind in self._behind.values():
            behind.turns.stop()

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
        late: Sequence[float] = (),
    ) -> None:
        """This rank's shard of the mean (or sum) of ``input`` over ``group``.

        Args:
            unit: whose gradient it is.
            output: ``[n]``.
            input: ``[W n]``, rank-major, of the same dtype.
            group: the sharding ranks.
            op: ``"mean"`` or ``"sum"``.
            whole: whether ``input`` holds all of the unit's trainable parameters. If not, the
                residual, which belongs to the whole unit, is not used.
            late: if nothing reads ``output`` before the backward pass ends, but that it is divided:
                by what it may be divided, 1 included. Then it may be written at the pass's end.
        """

        def work(output: Tensor, group: dist.ProcessGroup) -> None:
            codec = self._codec_now(unit, input.numel())
            residual = None
            if self._feeds_back(unit, codec, whole):
                residual = self._scatter_residual(unit, output, group.size())
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

        self._submit(unit, input, output, group, op, work, late)

    def all_reduce(
        self,
        unit: Unit,
        tensor: Tensor,
        group: dist.ProcessGroup,
        *,
        op: str = "mean",
        whole: bool = True,
        late: Sequence[float] = (),
    ) -> None:
        """Replace a contiguous tensor by its mean (or sum) over ``group``; the rest as above."""
        values = tensor.clone() if late else tensor

        def work(output: Tensor, group: dist.ProcessGroup) -> None:
            output.copy_(values)
            codec = self._codec_now(unit, output.numel())
            residuals = unit.reduce if self._feeds_back(unit, codec, whole) else None
            asked = self._agree(unit, output, group, op, codec)
            self._measure(unit, output, codec)
            traffic = all_reduce(
                output, codec, group, seed=self._seed(unit), residuals=residuals, agreed=True
            )
            world = group.size()
            if op == "sum":
                output.mul_(world)
            self._count(unit, traffic + asked, ring_nbytes(traffic.dense, world))

        self._submit(unit, tensor, tensor, group, op, work, late)

    def _codec_now(self, unit: Unit, numel: int) -> Codec:
        if self.closed:
            raise closed_error()
        if unit.steps < self.start_step or numel < self.min_numel:
            return DENSE
        return unit.coding.codec

    def _feeds_back(self, unit: Unit, codec: Codec, whole: bool) -> bool:
        if not unit.coding.feedback or codec is DENSE:
            return False
        unit.partial += not whole
        return whole

    def _agree(
        self, unit: Unit, values: Tensor, group: dist.ProcessGroup, op: str, codec: Codec
    ) -> Traffic:
        """Compare ranks before a reduction of a new unit, length or kind; returns the traffic."""
        key = self._key(unit, values, op, codec)
        if key in self._agreed:
            return Traffic()
        link = control_link(group)
        self._agreed.ensure(
            key,
            link,
            f"the gradients of {unit.name}",
            lambda: {
                "gradient": tensor_text(values),
                "op": op,
                "codec": choice_text(codec),
                "step": str(unit.steps),
                "seed": str(self.seed),
            },
        )
        return link.meter.traffic

    @staticmethod
    def _key(unit: Unit, values: Tensor, op: str, codec: Codec) -> object:
        return unit.name, op, codec.digest, values.numel(), values.dtype

    def _seed(self, unit: Unit) -> int:
        return derive_seed(self.seed, *unit.name.encode(), unit.steps)

    def _scatter_residual(self, unit: Unit, like: Tensor, world: int) -> Tensor:
        numel = scatter_residual_numel(unit.coding.codec, like.numel(), world)
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
        """Measure ``nmse`` for ``stats`` on a sample: 2^18 values every 64 reductions."""
        if codec is DENSE or (unit.nmse is not None and unit.steps % _MEASURE_EVERY):
            return
        sample = values.detach().reshape(-1)[:_MEASURED].float()
        energy = float(sample.square().sum())
        if not 0 < energy < float("inf"):
            return
        coder = CodecCoder(codec)
        try:
            body = coder.pack(sample, self._seed(unit), None)
        except NonFiniteError:
            return
        lost = sample - coder.mean([body], sample.numel())
        unit.nmse = float(lost.square().sum()) / energy

    def _count(self, unit: Unit, traffic: Traffic, dense_wire: int) -> None:
        unit.steps += 1
        self._dense_wire += dense_wire
        self.counters.add(traffic)
        if unit is next(iter(self.units.values())):
            self.counters.log(unit.steps)

    # -- what is reported and kept ------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps so far of the unit that has most."""
        return max((u.steps for u in self.units.values()), default=0)

    @property
    def traffic(self) -> Traffic:
        """Bytes and seconds of all units so far, of this rank."""
        return self.counters.traffic

    def stats(self) -> dict[str, Any]:
        """Counters by the keys of ``Compression.stats``; names are those of units.

        ``nmse`` is of the first 2^18 values of this rank's gradient, measured every 64 reductions.
        """
        units = self.units.values()
        return self.counters.stats(
            steps=self.step,
            dense_wire=self._dense_wire,
            residual_bytes=sum(u.nbytes for u in units),
            codecs={u.name: u.coding.label for u in units},
            nmse={u.name: u.nmse for u in units if u.nmse is not None},
            partial={u.name: u.partial for u in units},
        )

    def state_dict(self) -> State:
        """This rank's memory, flat: plain tensors (copies on the CPU) and ints.

        ``world``, ``rank``, ``steps.UNIT``, ``scatter.UNIT`` and ``reduce.UNIT|...``. Residuals are
        those of one rank: save it per rank.
        """
        out: State = {_WORLD: self.world, _RANK: self.rank}
        for name, unit in self.units.items():
            out[_STEPS + name] = unit.steps
            if unit.scatter is not None:
                out[_SCATTER + name] = unit.scatter.detach().cpu().clone()
            for key, value in unit.reduce.state_dict().items():
                out[f"{_REDUCE}{name}|{key}"] = value
        return out

    def load_state_dict(self, state: Mapping[str, Tensor | int], *, strict: bool = True) -> None:
        """Inverse of ``state_dict``; call it after ``compress``, before the first backward.

        All ranks load. In the next reductions they compare what they have loaded, except residuals.
        Residuals of another rank or world size belong to other parts of the model and are dropped
        with a warning: one step's rounding is lost. A residual whose unit has another length now is
        also dropped, in the unit's next reduction.

        Args:
            state: what ``state_dict`` returned.
            strict: ``False`` after the model has changed: units that are gone are dropped with a
                log line, and new ones start at step 0 without residuals.

        Raises:
            ConfigError: if ``strict``, the units of the state are not those of this model.
        """
        check_state(state)
        theirs = {k.removeprefix(_STEPS) for k in state if k.startswith(_STEPS)}
        if strict and theirs != set(self.units):
            raise ConfigError(
                f"expected the state of units {sorted(self.units)}, got {sorted(theirs)}; if the "
                "model has changed, load with strict=False"
            )
        for name in sorted(theirs - set(self.units)):
            _log.warning("the state of unit %r is dropped: this model has no such unit", name)
        self._agreed.clear()  # the terms may have changed
        for behind in self._behind.values():
            behind.forget()
        world, rank = int(state.get(_WORLD, -1)), int(state.get(_RANK, -1))
        known = (self.world, self.rank)
        same = (world, rank) == known
        if not same:
            _log.warning(
                "residuals of rank %d of %d are dropped: this is rank %d of %d", rank, world, *known
            )
        for name, unit in self.units.items():
            unit.steps = int(state.get(_STEPS + name, 0))
            kept = state.get(_SCATTER + name) if same else None
            unit.scatter = kept.detach().float().clone() if isinstance(kept, Tensor) else None
            prefix = f"{_REDUCE}{name}|"
            unit.reduce = Residuals()
            inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if same and inner:
                # Rank and size of the reducing group, which under HSDP is not the whole world.
                within = {key: int(inner[key]) for key in (_RANK, _WORLD)}
                unit.reduce.load_state_dict(inner, **within)


def agreed_state(
    make: Callable[[], ShardedState], groups: Sequence[dist.ProcessGroup]
) -> ShardedState:
    """Make a state with its units, and compare it with those of the ranks it will reduce with.

    Args:
        make: makes the state; an error that it raises on one rank is told to all.
        groups: the groups of the units; ranks of each compare once, in this order.

    Raises:
        AgreementError: ranks came with different settings or units.
    """
    state: ShardedState | None = None
    for group in {id(g): g for g in groups}.values():
        with must_agree(LinkChannel(control_link(group)), "compress") as mine:
            state = state or make()
            mine.update(state.terms())
    state = state or make()
    for asked, used in state.plan.substituted.items():
        _log.info(
            "gradcodec: %s in place of %s: a reduce-scatter under error_feedback='auto' keeps no "
            "residual; for the plain codec set error_feedback",
            used,
            asked,
        )
    return state
