"""Averages a bucket of gradients over all ranks, parameter by parameter."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradcodec.distributed.checks import misfit
from gradcodec.distributed.coding import Projection, RawCoder
from gradcodec.distributed.compression import State
from gradcodec.distributed.exchange.lanes import Operand, has_any
from gradcodec.distributed.exchange.link import Link
from gradcodec.distributed.exchange.terms import values_text
from gradcodec.distributed.exchange.two_shot import gathered_mean, two_shot_mean
from gradcodec.distributed.lowrank import AdaptiveBasis
from gradcodec.distributed.plan import Plan
from gradcodec.distributed.residuals import Residuals
from gradcodec.distributed.shards import derive_seed, first_owner, shard_ranges
from gradcodec.errors import ConfigError

_log = logging.getLogger(__name__)

_POWER = RawCoder(torch.bfloat16)
"""Codes power iterations. Rounding them changes which basis is chosen, not what is lost."""

_RESIDUALS = ("first", "second")
_OF_A_BASIS = ("start", "basis", "error")
_COUNTS = ("step", "seed", "auto", "rung", "world", "rank")


# -- where each gradient lies in a bucket ---------------------------------------------------------


@dataclass
class Slot:
    """A parameter's gradient in a bucket: its values in memory order, and its view."""

    name: str
    flat: Tensor
    view: Tensor


class ParameterNames:
    """Names of the parameters in a bucket; DDP itself knows only the objects.

    Args:
        parameters: those of the model, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._names = {id(p): n for n, p in parameters.items()}
        self._parameters = list(parameters.values())  # an id is only good while its object lives

    def names(self, bucket: Any) -> tuple[str, ...]:
        """Names of all parameters in a ``GradBucket``.

        Raises:
            ConfigError: one of them does not belong to the model.
        """
        found = []
        for parameter in bucket.parameters():
            name = self._names.get(id(parameter))
            if name is None:
                raise ConfigError(
                    f"a parameter of shape {tuple(parameter.shape)} is not one that this state was "
                    "made for; make it from the model that is trained, after changing the model"
                )
            found.append(name)
        return tuple(found)

    def slots(self, bucket: Any) -> list[Slot]:
        """Where the gradients of a dense bucket's parameters are, as real numbers."""
        buffer, slots = bucket.buffer(), []
        base, parameters = buffer.storage_offset(), bucket.parameters()
        for name, parameter, view in zip(
            self.names(bucket), parameters, bucket.gradients(), strict=True
        ):
            # DDP stores complex gradients as pairs of real numbers, but its offsets count pairs.
            width = 2 if parameter.is_complex() else 1
            at, numel = width * (view.storage_offset() - base), width * view.numel()
            flat = buffer[at : at + numel]
            slots.append(Slot(name, flat, view if width == 1 else flat.view(*view.shape, 2)))
        if sum(s.flat.numel() for s in slots) != buffer.numel():
            raise ConfigError(f"expected a bucket of its parameters, got {buffer.numel()} elements")
        return slots


# -- the mean of a bucket -------------------------------------------------------------------------


@dataclass
class _Sent:
    """What is exchanged for a slot, and what turns its mean into the mean gradient."""

    slot: Slot
    operand: Operand
    projection: Projection | None = None
    adaptive: AdaptiveBasis | None = None
    matrix: Tensor | None = None
    active: bool = True


@dataclass
class BucketReducer:
    """Averages buckets as planned; holds the state that is kept from step to step.

    Attributes:
        plan: an entry for every parameter.
        seed: of stochastic rounding and of the first start vectors.
        residuals: error feedback of coded parameters.
        adaptive: bases and residuals of low-rank parameters.
        nmse: relative squared error of each coded parameter when last measured, see ``reduce``.
        gathered: every rank gets all ranks' codes, in one shot instead of two.
    """

    plan: Plan
    seed: int
    residuals: Residuals = field(default_factory=Residuals)
    adaptive: dict[str, AdaptiveBasis] = field(default_factory=dict)
    nmse: dict[str, float] = field(default_factory=dict)
    gathered: bool = False

    def __post_init__(self) -> None:
        for name, entry in self.plan.entries.items():
            if entry.lowrank is not None:
                shape = self.plan.shapes[name]
                self.adaptive[name] = AdaptiveBasis(name, shape, entry.lowrank, self.seed)

    @torch.no_grad()
    def reduce(self, slots: list[Slot], link: Link, step: int, *, measure: bool = False) -> None:
        """Replace every gradient by its mean, in place.

            1. low-rank parameters that are due renew their bases: one exchange of power iterations
            2. all gradients, or their codes, are averaged: one two-shot exchange
            3. where the mean of codes is not finite, the gradients themselves are averaged

        Args:
            slots: the bucket's gradients, equal names and order on all ranks.
            link: to all ranks.
            step: equal on all ranks.
            measure: note in ``nmse`` what coding loses of each of this rank's gradients.
        """
        matrices = self._renew_bases(slots, link, step)
        sent = [self._prepare(slot, link, step, matrices.get(slot.name)) for slot in slots]
        if measure:
            self._measure([s for s in slots if not self.plan.entries[s.name].exact], matrices)
        mean_of = gathered_mean if self.gathered else two_shot_mean
        mean_of([one.operand for one in sent], link, context=step)
        broken = [one.slot for one in sent if not self._take(one, link.size)]
        if broken:
            self.reduce_raw(broken, link, step)

    @torch.no_grad()
    def use(self, plan: Plan, rank: int, world: int) -> None:
        """Code by another plan from now on; residuals are expressed as its codecs keep them.

        A codec without error feedback leaves them alone, until another one or a dense step comes.
        """
        before, self.plan = self.plan, plan
        for name, new in plan.entries.items():
            old = before.entries[name]
            ends = old.route.coder, new.route.coder
            if ends[0] is ends[1] or not self.residuals.has([name]):
                continue
            assert ends[0] is not None
            assert ends[1] is not None
            numel = math.prod(plan.shapes[name])
            self.residuals.recode(name, numel, ends[0], ends[1], rank, world)

    @torch.no_grad()
    def send_rest(self, slots: list[Slot], rank: int, world: int) -> None:
        """Add what coding has lost so far to gradients that are averaged exactly."""
        for slot in slots:
            coder = self.plan.entries[slot.name].route.coder
            if coder is not None and self.residuals.has([slot.name]):
                self.residuals.take(slot.name, slot.flat, coder, rank, world)

    @torch.no_grad()
    def reduce_raw(self, slots: list[Slot], link: Link, step: int) -> None:
        """The exact mean, by the same two shots in the gradients' own dtype."""
        operands = [
            Operand(
                s.flat, RawCoder(s.flat.dtype), s.flat, first_owner=first_owner(s.name, link.size)
            )
            for s in slots
        ]
        two_shot_mean(operands, link, context=step)

    def _seed(self, step: int, name: str) -> int:
        return derive_seed(self.seed, step, zlib.crc32(name.encode()))

    # -- step 1 ---------------------------------------------------------------------------

    def _renew_bases(
        self, slots: list[Slot], link: Link, step: int
    ) -> dict[str, tuple[Tensor, bool]]:
        """``M`` of every low-rank parameter, with new bases where they are due.

        Each comes with whether it has a gradient. A gradient of zeros takes no part in error
        feedback: its parameter is unused in this step, or its rank has joined.
        """
        found, due = {}, []
        meter = link.meter
        with meter.phase("encode"):
            for slot in slots:
                adaptive = self.adaptive.get(slot.name)
                if adaptive is None:
                    continue
                adaptive.to(slot.flat.device)
                active = has_any(slot.flat)
                m = adaptive.with_error(slot.flat, active and self.plan.entries[slot.name].feedback)
                found[slot.name] = (m, active)
                if adaptive.due(step):
                    powered = adaptive.powered(m)
                    owner = first_owner(slot.name, link.size)
                    due.append((adaptive, Operand(powered, _POWER, powered, first_owner=owner)))
        if due:
            two_shot_mean([operand for _, operand in due], link, context=step)
            with meter.phase("encode"):
                for adaptive, operand in due:
                    adaptive.renew(operand.out)
        return found

    # -- step 2 ---------------------------------------------------------------------------

    def _prepare(
        self, slot: Slot, link: Link, step: int, matrix: tuple[Tensor, bool] | None
    ) -> _Sent:
        entry = self.plan.entries[slot.name]
        route = entry.route
        seed, owner = self._seed(step, slot.name), first_owner(slot.name, link.size)
        if matrix is not None:
            adaptive, (m, active) = self.adaptive[slot.name], matrix
            with link.meter.phase("encode"):
                # If no finite power iteration has made a basis yet, NaN tells everyone so.
                code = (
                    torch.full((adaptive.short * adaptive.settings.rank,), torch.nan)
                    if adaptive.basis is None
                    else adaptive.code(m)
                ).to(slot.flat.device)
            out = torch.empty_like(code)
            operand = Operand(code, route.coder_for(code.dtype), out, seed, owner)
            operand.note_loss = route.coder is not None and entry.feedback
            return _Sent(slot, operand, None, adaptive, m, active)
        values, projection = slot.flat, route.projection
        if projection is not None:
            with link.meter.phase("encode"):
                values = projection.code(slot.view.reshape(-1))
        operand = Operand(values, route.coder_for(values.dtype), values, seed, owner)
        if route.coder is not None and entry.feedback and self.gathered:
            operand.first = self.residuals.whole(slot.name, values, operand.coder)
        elif route.coder is not None and entry.feedback:
            operand.first, operand.second = self.residuals.of(
                slot.name, values, operand.coder, link.rank, link.size
            )
        return _Sent(slot, operand, projection)

    def _take(self, sent: _Sent, world: int) -> bool:
        """Write the mean gradient; return ``False`` if the mean of the codes is not finite."""
        operand, slot, adaptive = sent.operand, sent.slot, sent.adaptive
        if sent.projection is None and adaptive is None:
            return True  # The exchange wrote it already, values that are not finite included.
        if not bool(torch.isfinite(operand.out).all()):
            return False
        if sent.projection is not None:
            slot.view.copy_(sent.projection.values(operand.out).view(slot.view.shape))
            return True
        assert adaptive is not None
        if self.plan.entries[slot.name].feedback:
            self._keep_rest(sent, adaptive, world)
        slot.flat.copy_(adaptive.flat(adaptive.values(operand.out)))
        adaptive.follow(operand.out)
        return True

    def _keep_rest(self, sent: _Sent, adaptive: AdaptiveBasis, world: int) -> None:
        """``E <- M - U z^``, plus what the owner's coding lost of the mean, times ``world``."""
        operand, m = sent.operand, sent.matrix
        assert m is not None
        if sent.active:
            code = operand.values
            if operand.lost_first is not None:
                code = code - operand.lost_first
            adaptive.error = m - adaptive.values(code)
        if operand.lost_second is not None and has_any(operand.lost_second):
            again = adaptive.values(operand.lost_second * world)
            adaptive.error = again if adaptive.error is None else adaptive.error + again

    def _measure(self, slots: list[Slot], matrices: dict[str, tuple[Tensor, bool]]) -> None:
        """Squared error of coding this rank's gradient, without feedback, over its square.

        For low-rank parameters: the part of gradient plus residual that is outside the basis.
        """
        for slot in slots:
            route, (matrix, _) = (
                self.plan.entries[slot.name].route,
                matrices.get(slot.name, (None, False)),
            )
            if matrix is not None:
                adaptive = self.adaptive[slot.name]
                if adaptive.basis is None:
                    continue
                truth, back = matrix, adaptive.values(adaptive.code(matrix))
            else:
                truth = slot.view.reshape(-1).float() if route.projection else slot.flat.float()
                code = route.projection.code(truth) if route.projection else truth
                if route.coder is not None and bool(torch.isfinite(code).all()):
                    body = route.coder.pack(code, self.seed, None)
                    code = route.coder.mean([body], code.numel())
                back = route.projection.values(code) if route.projection else code
            power = float(truth.square().sum())
            self.nmse[slot.name] = float((truth - back).square().sum()) / power if power else 0.0

    # -- what is kept ---------------------------------------------------------------------

    @property
    def residual_nbytes(self) -> int:
        """Memory of error feedback."""
        errors = (one.error for one in self.adaptive.values() if one.error is not None)
        return self.residuals.nbytes + sum(4 * error.numel() for error in errors)

    def terms(self, names: Sequence[str]) -> dict[str, str]:
        """Bases and start vectors of low-rank parameters, as ranks compare them."""
        found = {}
        for name in names:
            if (adaptive := self.adaptive.get(name)) is not None:
                found[f"basis of {name}"] = values_text(adaptive.basis)
                found[f"start vectors of {name}"] = values_text(adaptive.start)
        return found

    def state_dict(self) -> State:
        """``first.NAME``, ``second.NAME``, ``start.NAME``, ``basis.NAME`` and ``error.NAME``."""
        out = self.residuals.state_dict()
        for name, adaptive in self.adaptive.items():
            out.update(adaptive.state_dict(name))
        return out

    def known(self, state: Mapping[str, Tensor | int], strict: bool) -> dict[str, Tensor | int]:
        """The state without keys of other parameters; independent of the number of ranks.

        Raises:
            ConfigError: if ``strict`` and there is such a key; names the first.
        """
        kept = {}
        for key, value in state.items():
            kind, _, name = key.partition(".")
            of_ours = kind in (*_RESIDUALS, *_OF_A_BASIS) and name in self.plan.shapes
            if of_ours or key in _COUNTS:
                kept[key] = value
            elif strict:
                raise ConfigError(
                    f"a state of other parameters: {key!r} is not of this model; if the model has "
                    "changed, load with strict=False"
                )
            else:
                _log.warning("%r is dropped: this model has no such parameter", key)
        return kept

    def load_state_dict(
        self, state: Mapping[str, Tensor | int], *, rank: int, world: int, strict: bool
    ) -> None:
        """Inverse of ``state_dict``, for this rank and number of ranks.

        Raises:
            ConfigError: if ``strict``, a residual or a basis has another length or shape. If not
                ``strict``, all that is kept for its parameter is dropped with a log line.
        """
        fitting = dict(state)
        for name in self.plan.entries:
            text = self._misfit(name, state, rank, world)
            if text and strict:
                raise ConfigError(text)
            if text:
                _log.warning("%s; what was kept for %s is dropped", text, name)
                for kind in (*_RESIDUALS, *_OF_A_BASIS):
                    fitting.pop(f"{kind}.{name}", None)
        self.residuals.load_state_dict(fitting, rank=rank, world=world)
        for name, adaptive in self.adaptive.items():
            adaptive.load_state_dict(name, fitting)

    def _misfit(self, name: str, state: Mapping[str, Tensor | int], rank: int, world: int) -> str:
        """Why a parameter's state does not fit its shape and codec here; empty if it fits."""
        if name in self.adaptive:
            return self.adaptive[name].misfit(name, state)
        coder, projection = (
            self.plan.entries[name].route.coder,
            self.plan.entries[name].route.projection,
        )
        if coder is None:
            return ""
        whole = math.prod(self.plan.shapes[name])
        numel = whole if projection is None else projection.code_numel
        sizes = [
            coder.residual_numel(stop - start)
            for start, stop in shard_ranges(numel, world, coder.align)
        ]
        expected = {"first": sum(sizes)}
        if (state.get("rank"), state.get("world")) == (rank, world):  # else it is dropped
            expected["second"] = sizes[(rank - first_owner(name, world)) % world]
        found = (
            misfit(f"{kind}.{name}", state[f"{kind}.{name}"], size)
            for kind, size in expected.items()
            if f"{kind}.{name}" in state
        )
        return next(filter(None, found), "")
