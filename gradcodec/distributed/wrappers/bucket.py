"""One bucket of gradients becomes its mean over all ranks, parameter by parameter."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradcodec.distributed.checks import check_tensor
from gradcodec.distributed.coding import RawCoder
from gradcodec.distributed.exchange.lanes import Piece, has_any
from gradcodec.distributed.exchange.link import Link
from gradcodec.distributed.exchange.two_shot import mean_of
from gradcodec.distributed.lowrank import Follower
from gradcodec.distributed.plan import Policy
from gradcodec.distributed.residuals import Residuals
from gradcodec.distributed.routes import Projection, Route
from gradcodec.distributed.shards import cut, derive_seed, turn
from gradcodec.distributed.wrappers.slots import Slot

_BASIS = RawCoder(torch.bfloat16)
"""Of power iterations: rounding them changes which basis is taken, not what is lost."""


@dataclass
class _Coded:
    """A piece on its way and what becomes of its mean."""

    slot: Slot
    piece: Piece
    projection: Projection | None = None
    follower: Follower | None = None
    matrix: Tensor | None = None
    active: bool = True


@dataclass
class BucketReducer:
    """Averages buckets by the policy's routes; holds what must survive from step to step.

    Attributes:
        policy: a route for every parameter.
        seed: of stochastic rounding and of first bases.
        feedback: ``True``, ``False`` or ``None`` for what each route asks for.
        residuals: error feedback of coded parameters.
        followers: bases and residuals of low-rank parameters.
        shapes: of all parameters.
        nmse: last measured loss of each coded parameter, see ``measure``.
    """

    policy: Policy
    seed: int
    feedback: bool | None
    shapes: Mapping[str, tuple[int, ...]]
    residuals: Residuals = field(default_factory=Residuals)
    followers: dict[str, Follower] = field(default_factory=dict)
    nmse: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, settings in self.policy.lowrank.items():
            self.followers[name] = Follower(name, self.shapes[name], settings, self.seed)

    @torch.no_grad()
    def reduce(self, slots: list[Slot], link: Link, step: int, *, measure: bool = False) -> None:
        """Replace every gradient by its mean, in place.

            1. low-rank parameters that are due renew their bases: one exchange of power iterations
            2. all gradients or their codes: one two-shot exchange
            3. where a code's mean is not finite, the gradients themselves are averaged

        Args:
            slots: the bucket's gradients, equal names and order on all ranks.
            link: to all ranks.
            step: equal on all ranks.
            measure: note in ``nmse`` what coding loses of each gradient.
        """
        routes = self.policy.routes
        ready = self._follow(slots, link, step)
        coded = [self._piece(s, routes[s.name], link, step, ready.get(s.name)) for s in slots]
        if measure:
            self._measure([s for s in slots if not self._is_raw(s.name)], ready)
        mean_of([c.piece for c in coded], link, context=step)
        broken = [c.slot for c in coded if not self._take(c, link.size)]
        if broken:
            self.reduce_raw(broken, link, step)

    @torch.no_grad()
    def reduce_raw(self, slots: list[Slot], link: Link, step: int) -> None:
        """The exact mean, by the same two shots in the gradients' own dtype."""
        pieces = [
            Piece(s.flat, RawCoder(s.flat.dtype), s.flat, turn=turn(s.name, link.size))
            for s in slots
        ]
        mean_of(pieces, link, context=step)

    def check_residuals(self, state: Mapping[str, object], world: int) -> None:
        """That the residuals of a loaded state are as long as those of its parameters are here.

        Raises:
            ConfigError: names one that is not.
        """
        for name, route in self.policy.routes.items():
            key = f"first.{name}"
            if key not in state or route.coder is None or name in self.followers:
                continue
            projection, coder = route.projection, route.coder
            numel = math.prod(self.shapes[name]) if projection is None else projection.code_numel
            parts = cut(numel, world, coder.align)
            check_tensor(key, state[key], sum(coder.residual_numel(b - a) for a, b in parts))

    def _is_raw(self, name: str) -> bool:
        route = self.policy.routes[name]
        return route.coder is None and route.projection is None and name not in self.followers

    def _keeps(self, route: Route) -> bool:
        return route.feedback if self.feedback is None else self.feedback

    def _seed(self, step: int, name: str) -> int:
        return derive_seed(self.seed, step, zlib.crc32(name.encode()))

    # -- step 1 ---------------------------------------------------------------------------

    def _follow(self, slots: list[Slot], link: Link, step: int) -> dict[str, tuple[Tensor, bool]]:
        """``M`` of every low-rank parameter, with new bases where they are due."""
        ready, due = {}, []
        meter = link.meter
        with meter.phase("encode"):
            for slot in slots:
                follower = self.followers.get(slot.name)
                if follower is None:
                    continue
                follower.to(slot.flat.device)
                # A gradient that is all zeros takes no part: unused, or a rank that has joined.
                active = has_any(slot.flat)
                m = follower.with_error(slot.flat, active and self.feedback is not False)
                ready[slot.name] = (m, active)
                if follower.due(step):
                    powered = follower.powered(m)
                    owner = turn(slot.name, link.size)
                    due.append((follower, Piece(powered, _BASIS, powered, turn=owner)))
        if due:
            mean_of([piece for _, piece in due], link, context=step)
            with meter.phase("encode"):
                for follower, piece in due:
                    follower.renew(piece.out)
        return ready

    # -- step 2 ---------------------------------------------------------------------------

    def _piece(
        self, slot: Slot, route: Route, link: Link, step: int, ready: tuple[Tensor, bool] | None
    ) -> _Coded:
        seed, first_owner = self._seed(step, slot.name), turn(slot.name, link.size)
        if ready is not None:
            follower, (m, active) = self.followers[slot.name], ready
            with link.meter.phase("encode"):
                # No basis yet and no finite power iteration: NaN says so to everyone.
                code = (
                    torch.full((follower.short * follower.settings.rank,), torch.nan)
                    if follower.basis is None
                    else follower.code(m)
                ).to(slot.flat.device)
            out = torch.empty_like(code)
            piece = Piece(code, route.coder_for(code.dtype), out, seed, first_owner)
            piece.echo = route.coder is not None and self.feedback is not False
            return _Coded(slot, piece, None, follower, m, active)
        with link.meter.phase("encode"):
            projection = route.projection
            values = slot.flat
            if projection is not None:
                values = projection.code(slot.view.reshape(-1))
        piece = Piece(values, route.coder_for(values.dtype), values, seed, first_owner)
        if route.coder is not None and self._keeps(route):
            piece.first, piece.second = self.residuals.of(
                slot.name, values, piece.coder, link.rank, link.size
            )
        return _Coded(slot, piece, projection)

    def _take(self, coded: _Coded, world: int) -> bool:
        """Write the mean gradient; ``False`` if the mean of the codes is not finite."""
        piece, slot, follower = coded.piece, coded.slot, coded.follower
        if coded.projection is None and follower is None:
            return True  # The exchange wrote it, and sent what is not finite as it was.
        if not bool(torch.isfinite(piece.out).all()):
            return False
        if coded.projection is not None:
            slot.view.copy_(coded.projection.values(piece.out).view(slot.view.shape))
            return True
        assert follower is not None
        if self.feedback is not False:
            self._keep_rest(coded, follower, world)
        slot.flat.copy_(follower.flat(follower.values(piece.out)))
        follower.follow(piece.out)
        return True

    def _keep_rest(self, coded: _Coded, follower: Follower, world: int) -> None:
        """``E <- M - U z^``, and what the owner's second coding lost of a mean of ``world``."""
        piece, m = coded.piece, coded.matrix
        assert m is not None
        if coded.active:
            sent = piece.values
            if piece.lost_first is not None:
                sent = sent - piece.lost_first
            follower.error = m - follower.values(sent)
        if piece.lost_second is not None and has_any(piece.lost_second):
            again = follower.values(piece.lost_second * world)
            follower.error = again if follower.error is None else follower.error + again

    def _measure(self, slots: list[Slot], ready: dict[str, tuple[Tensor, bool]]) -> None:
        """Squared error of coding this rank's gradient, without feedback, over its square.

        Of low-rank parameters: what lies outside the basis, of gradient and residual together.
        """
        for slot in slots:
            route, (matrix, _) = self.policy.routes[slot.name], ready.get(slot.name, (None, False))
            if matrix is not None:
                follower = self.followers[slot.name]
                if follower.basis is None:
                    continue
                truth, back = matrix, follower.values(follower.code(matrix))
            else:
                truth = slot.view.reshape(-1).float() if route.projection else slot.flat.float()
                code = route.projection.code(truth) if route.projection else truth
                if route.coder is not None and bool(torch.isfinite(code).all()):
                    body = route.coder.pack(code, self.seed, None)
                    code = route.coder.mean([body], code.numel())
                back = route.projection.values(code) if route.projection else code
            power = float(truth.square().sum())
            self.nmse[slot.name] = float((truth - back).square().sum()) / power if power else 0.0
