"""``ShardedState``: the compressed gradients of a model in FSDP1, FSDP2 or HSDP, unit by unit."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.distributed.checks import check_settings, check_state, rule_pairs
from gradcodec.distributed.coding import DENSE
from gradcodec.distributed.compression import Closing, State, closed_error
from gradcodec.distributed.exchange.agreement import Agreed, LinkChannel, must_agree
from gradcodec.distributed.exchange.collectives import (
    all_reduce,
    reduce_scatter,
)
from gradcodec.distributed.exchange.link import control_link
from gradcodec.distributed.exchange.terms import choice_text, tensor_text
from gradcodec.distributed.meter import Counters, Traffic, ring_nbytes
from gradcodec.distributed.plan import UnitPlan
from gradcodec.distributed.wrappers.behind import Behind
from gradcodec.distributed.wrappers.unit import STEPS, Unit
from gradcodec.errors import ConfigError

_log = logging.getLogger(__name__)

_WORLD, _RANK = "world", "rank"


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

    def finish_behind(self) -> None:
        """Before the next pass: write what one that failed has left; raises what made it fail."""
        if self.closed or not torch.is_grad_enabled():
            return
        for behind in self._behind.values():
            behind.finish()

    def _submit(
        self,
        unit: Unit,
        values: Tensor,
        output: Tensor,
        group: dist.ProcessGroup,
        op: str,
        work: Callable[[Tensor, dist.ProcessGroup], None],
        late: Sequence[float] | None,
    ) -> None:
        """Let ``work`` write into ``output``: here, or by a worker behind the backward pass."""
        behind = self._behind.get(id(group))
        if behind is None:
            work(output, group)
            return
        if late is None:
            behind.finish()  # the unit may be under way

        def reduced(sister: dist.ProcessGroup) -> Tensor:
            own = torch.empty_like(output)
            work(own, sister)
            return own

        key = self._key(unit, values, op, self._codec_now(unit, values.numel()))
        behind.reduce(key, output, reduced, late=late is not None, factors=late or ())

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
        late: Sequence[float] | None = None,
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
            late: if nothing reads ``output`` before the backward pass ends, but that it may be
                divided: by what, 1 included; empty if it is not. Then it may be written at the
                pass's end. ``None``: it is read at once.
        """

        def work(output: Tensor, group: dist.ProcessGroup) -> None:
            codec = self._codec_now(unit, input.numel())
            residual = None
            if unit.feeds_back(codec, whole):
                residual = unit.scatter_residual(output, group.size())
            asked = self._agree(unit, input, group, op, codec)
            unit.measure(input, codec, unit.seed(self.seed))
            traffic = reduce_scatter(
                output,
                input,
                codec,
                group,
                op=op,
                seed=unit.seed(self.seed),
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
        late: Sequence[float] | None = None,
    ) -> None:
        """Replace a contiguous tensor by its mean (or sum) over ``group``; the rest as above."""
        values = tensor if late is None else tensor.clone()

        def work(output: Tensor, group: dist.ProcessGroup) -> None:
            output.copy_(values)
            codec = self._codec_now(unit, output.numel())
            residuals = unit.reduce if unit.feeds_back(codec, whole) else None
            asked = self._agree(unit, output, group, op, codec)
            unit.measure(output, codec, unit.seed(self.seed))
            traffic = all_reduce(
                output, codec, group, seed=unit.seed(self.seed), residuals=residuals, agreed=True
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
        for unit in self.units.values():
            out.update(unit.saved())
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
        theirs = {k.removeprefix(STEPS) for k in state if k.startswith(STEPS)}
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
        for unit in self.units.values():
            unit.restore(state, residuals=same)


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
