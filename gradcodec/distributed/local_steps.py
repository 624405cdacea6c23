"""Local steps: ranks train apart, and now and then average what they have learnt, coded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradcodec.codec import Codec
from gradcodec.distributed.anchors import Anchors, OuterSGD
from gradcodec.distributed.catch_up import Position, catch_up
from gradcodec.distributed.checks import check_settings, rule_pairs
from gradcodec.distributed.coding import named_codec
from gradcodec.distributed.compression import Closing, State
from gradcodec.distributed.exchange.agreement import LinkChannel, must_agree
from gradcodec.distributed.exchange.link import control_link
from gradcodec.distributed.exchange.terms import choice_text, rules_text, values_text
from gradcodec.distributed.flights import Flights
from gradcodec.distributed.fragments import Schedule, fragments_of
from gradcodec.distributed.local_parts import Replicas, group_of, local_parameters, reshard
from gradcodec.distributed.local_state import (
    COUNTS,
    check_kinds,
    check_schedule,
    fitting,
    ours_and_rest,
    share,
)
from gradcodec.distributed.meter import Counters, Traffic, ring_nbytes
from gradcodec.distributed.plan import Plan
from gradcodec.distributed.wrappers.bucket import BucketReducer
from gradcodec.errors import ConfigError, TrainingError
from gradcodec.parameters import NamedParameters

_WHAT = "LocalSteps"
_EXCHANGES = ("two-shot", "gather")


class LocalSteps(Closing):
    """Low-communication training (DiLoCo): exchange every ``H`` steps, with any codec.

    Every rank trains its own copy θ_r with its own optimiser. All ranks keep equal anchors a. Every
    ``H`` steps, for each parameter (C is the codec, e_r the residual of rank r):

        x_r = (a - θ_r) + decay * e_r
        e_r = x_r - C(x_r)
        a   = outer(a, mean of C(x_r) over the ranks)
        θ_r = mixing * θ_r + (1 - mixing) * a

    ``fragments=P`` exchanges a ``P``-th of the parameters every ``H/P`` steps, and ``overlap=tau``
    does the last step ``tau`` steps later, while training goes on: Streaming DiLoCo. Anchors are
    equal to the bit on all ranks, since all decode the same bytes.

        local = LocalSteps(model, optimizer, every=32, codec="int4")
        for batch in data:
            optimizer.zero_grad()
            loss(model, batch).backward()
            local.step()                        # optimizer.step(), and the exchange when it is due
        local.finish()                          # all ranks end with equal parameters

    Published methods, by their settings:

    - local SGD, FedAvg: ``codec="fp32", outer=OuterSGD(lr=1, momentum=0)``
    - DiLoCo (arXiv 2311.08105): ``codec="fp32"``
    - Streaming DiLoCo (2501.18512): ``codec="int4", fragments=4, overlap=2, error_feedback=False``
    - SparseLoCo (2508.15706): ``codec=TopK(TopKConfig(k=64, bits=2)), decay=0.95,
      outer=OuterSGD(lr=1, momentum=0), exchange="gather"``

    Deviations: Streaming DiLoCo sends 4-bit floats, here ``"int4"`` has 15 integer levels and a
    scale for each block; its fragments are layers, here they are of equal size. SparseLoCo
    quantises to 2 bits with statistics of its own; here levels are those of ``BlockQuant``.

    Args:
        model: a plain module, its named parameters, or a module that ``fully_shard`` shards on one
            dimension (then with ``replicas``). All ranks start with equal parameters.
        optimizer: the inner optimiser, whose ``step`` is called by ``step``; ``None`` if the caller
            has done its step (for example through a ``GradScaler``).
        outer: the outer step.
        every: ``H``, local steps between two exchanges of one parameter.
        codec: a codec that needs no fitting, a fitted ``Subspace``, or a name of ``make_codec``.
        fragments: ``P``; it divides ``H``.
        overlap: ``tau``, under ``H``: steps during which an exchange runs in the background.
        mixing: share of its own parameters that a rank keeps, under 1; by default 0, and 0.5 with
            overlap.
        decay: share of the residual that is fed back, from 0 to 1.
        exchange: ``"two-shot"`` sends shards to their owners and codes the means again (each rank
            sends ``2 (W - 1) / W`` codes); ``"gather"`` sends each rank's code to all others
            (``W - 1`` codes), and loses nothing of the mean.
        replicas: mesh or group of the ranks that average; the default group.
        rules, min_numel, error_feedback, seed, log_every: as for ``CompressState``.
        offload: keep anchors and outer momentum in host memory.
        joining: this rank comes to a training that is under way; it must call ``join`` next.

    Raises:
        ConfigError: a setting is wrong, or gradients are averaged in every step already.
        AgreementError: ranks came with different settings or different parameters.

    What to know: buffers, and the states of inner optimisers, are not exchanged. Anchors take 4
    bytes per parameter, the outer momentum and error feedback 4 each.
    """

    def __init__(
        self,
        model: NamedParameters,
        optimizer: Optimizer | None = None,
        *,
        outer: OuterSGD | None = None,
        every: int = 32,
        codec: Codec | str = "int4",
        fragments: int = 1,
        overlap: int = 0,
        mixing: float | None = None,
        decay: float = 1.0,
        exchange: str = "two-shot",
        replicas: Replicas = None,
        rules: Sequence[tuple[str, Codec | str]] = (),
        min_numel: int = 4096,
        error_feedback: bool | str = "auto",
        seed: int = 0,
        offload: bool = False,
        joining: bool = False,
        log_every: int | None = None,
    ) -> None:
        outer = OuterSGD() if outer is None else outer
        group = group_of(replicas)
        with must_agree(None if joining else _channel(group), _WHAT) as mine:
            check_kinds(optimizer, outer, offload, joining)
            check_settings(
                error_feedback=error_feedback, seed=seed, log_every=log_every, min_numel=min_numel
            )
            self.schedule = Schedule(every, fragments, overlap)
            self.decay = share("decay", decay, whole=True)
            if decay != 1.0 and error_feedback is False:
                raise ConfigError(
                    f"decay={decay} is of the residual, which error_feedback=False does not keep"
                )
            self.mixing = share("mixing", (0.5 if overlap else 0.0) if mixing is None else mixing)
            if exchange not in _EXCHANGES:
                raise ConfigError(f"expected exchange of {list(_EXCHANGES)}, got {exchange!r}")
            pairs = rule_pairs(rules)
            for choice in (codec, *(one for _, one in pairs)):
                named_codec(choice)
            parameters = local_parameters(model, replicas)
            # By whole parameters: the ranks that shard one send its shards at the same time.
            self.fragments = fragments_of({n: p.numel() for n, p in parameters.items()}, fragments)
            self.anchors = Anchors(parameters, outer, offload)
            locals_ = {n: self.anchors.local(n) for n in parameters}
            shapes = {n: tuple(t.shape) for n, t in locals_.items()}
            feedback = None if error_feedback == "auto" else bool(error_feedback)
            plan = Plan(shapes, codec, min_numel, pairs, feedback)
            self._terms = {
                "codec": choice_text(codec),
                "rules": rules_text(pairs),
                "schedule": repr(self.schedule),
                "outer": repr(outer),
                "decay, mixing": f"{self.decay}, {self.mixing}",
                "exchange": exchange,
                "error_feedback, min_numel": f"{error_feedback}, {min_numel}",
                "seed": str(seed),
                **plan.terms(locals_),
            }
            mine.update(self._terms)
            if not joining:
                mine.update({f"value of {n}": values_text(t) for n, t in locals_.items()})
        self.model, self.inner = model, optimizer
        self.reducer = BucketReducer(plan, seed, gathered=exchange == "gather")
        self.counters = Counters(log_every)
        self._device = next(iter(locals_.values())).device
        self._dense = sum(t.numel() * t.element_size() for t in locals_.values())
        self._at = Position()
        self._flights = Flights(
            _WHAT, self.anchors, self.reducer, self.decay, self.counters, self._device
        )
        self._settled: set[int] = set()  # fragments whose parameters are the anchors now
        self._waits_for_join = joining
        if not joining:
            self._flights.start(group, bool(overlap))

    # -- training -----------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One local step, then whatever is due; call it on all ranks alike.

        Args:
            closure: for the inner optimiser, whose result is returned.

        Raises:
            ConfigError: there is a closure, and no inner optimiser to call it.
            TrainingError: an exchange failed, or a mean is not finite. Anchors and parameters of
                the fragment, and error feedback, are as before; what was trained is sent at the
                next exchange.
        """
        self._check_open()
        result = None
        if self.inner is None and closure is not None:
            raise ConfigError("step(closure) is for the inner optimiser, and optimizer is None")
        if self.inner is not None:
            with torch.enable_grad():
                result = self.inner.step() if closure is None else self.inner.step(closure)
        self._settled.clear()
        self._at = Position(self._at.step + 1, self._at.merged)
        step, overlap = self._at.step, self.schedule.overlap
        if overlap and (arrived := self.schedule.merged(step)) is not None:
            self._land(arrived, self.mixing)
        if (due := self.schedule.sent(step)) is not None:
            self._flights.send(due, self.fragments[due], step)
            if not overlap:
                self._land(due, self.mixing)
        self.counters.log(step)
        return result

    @torch.no_grad()
    def finish(self) -> None:
        """Exchange everything now; parameters are then the anchors, equal on all ranks.

        All ranks call it, at the end or before an evaluation that wants one model. The schedule
        stays as it is. Fragments that were exchanged since the last step are left alone: nothing
        was trained since, and an outer step along zeros would still follow its momentum.

        Raises:
            TrainingError: as ``step``.
        """
        self._check_open()
        for fragment in self._flights:
            self._land(fragment, self.mixing)
        for fragment in range(len(self.fragments)):
            if fragment in self._settled:
                continue
            self._flights.send(fragment, self.fragments[fragment], self._at.step)
            self._land(fragment, 0.0)

    def _land(self, fragment: int, mixing: float) -> None:
        """The outer step with the means that came, and the merge."""
        means = self._flights.take(fragment)
        if means is None:
            return  # its exchange failed, and a rank has joined since
        for name, mean in means.items():
            # The same bits came to all ranks, so either all or none of them raise.
            if not bool(torch.isfinite(mean).all()):
                raise TrainingError(
                    f"step {self._at.step}: the mean pseudo-gradient of {name!r} is not finite: "
                    "training has diverged on some rank; anchors are as before, load_state_dict "
                    "takes all ranks back"
                )
        for name, mean in means.items():
            self.anchors.advance(name, mean)
            self.anchors.merge(name, mixing)
        reshard(self.model)
        if not mixing:
            self._settled.add(fragment)
        self._at = Position(self._at.step, self._at.merged + 1)

    # -- ranks that come and go -----------------------------------------------------------------

    @torch.no_grad()
    def join(self, replicas: Replicas = None) -> None:
        """Go on with the ranks of a new group, of which some may be new or come back.

        All of its ranks call this: those that train on between two steps, others after
        ``LocalSteps(..., joining=True)``. Ranks that are behind get anchors, outer momentum and
        counters from the first of those ahead, and start from the anchors without residuals; their
        inner optimisers start as they are. Ranks ahead keep their parameters and residuals; of a
        changed world, those of owned shards are dropped. Exchanges under way are merged, or
        dropped if they failed.

        The caller makes the group: to notice that a rank has died, and to agree on who is there, is
        the launcher's part (``torchrun``'s elastic restarts, torchft).

        Args:
            replicas: mesh or group of the ranks; the default group.

        Raises:
            AgreementError: ranks came with different settings, or anchors differ among those ahead.
            TrainingError: a rank is gone.
        """
        if self.closed:
            raise _closed()
        for fragment in self._flights:
            try:
                self._land(fragment, self.mixing)
            except TrainingError:
                continue  # a rank is gone: why there is a new group
        group = group_of(replicas)
        with must_agree(_channel(group), _WHAT) as mine:
            mine.update(self._terms)
        self._at, behind, traffic = catch_up(self.anchors, self._at, group, self._device)
        self.counters.add(traffic)
        residuals = self.reducer.residuals
        if behind:
            residuals.forget()
            for name in self.anchors.values:
                self.anchors.merge(name, 0.0)
            reshard(self.model)
        with must_agree(_channel(group), _WHAT) as mine:
            mine.update({n: values_text(t) for n, t in self.anchors.tensors().items()})
        self._flights.start(group, bool(self.schedule.overlap))
        if residuals.world is not None:
            rank, world = self._flights.rank, self._flights.world
            residuals.load_state_dict(residuals.state_dict(), rank=rank, world=world)
        self._waits_for_join = False
        self._settled.clear()  # ranks that were behind cannot know

    def _check_open(self) -> None:
        if self.closed:
            raise _closed()
        if self._waits_for_join:
            raise ConfigError("made with joining=True: call join() on all ranks before step()")

    def close(self) -> None:
        """End the thread. A step that comes after it raises ``TrainingError``."""
        super().close()
        self._flights.close()

    # -- what it knows --------------------------------------------------------------------------

    @property
    def traffic(self) -> Traffic:
        """Bytes and seconds so far, of this rank."""
        return self.counters.traffic

    def stats(self) -> dict[str, Any]:
        """Counters by the keys of ``Compression.stats``; names are those of parameters.

        ``dense_bytes`` counts pseudo-gradients; ``dense_wire_bytes`` is what a ring all-reduce of
        the gradients in every local step would have sent, as plain DDP does.
        """
        return self.counters.stats(
            steps=self._at.step,
            dense_wire=self._at.step * ring_nbytes(self._dense, self._flights.world),
            residual_bytes=self.reducer.residual_nbytes,
            codecs=self.reducer.plan.labels(),
        )

    def state_dict(self) -> State:
        """What a resumed run needs, with its model and inner optimiser, to go on with equal bits.

        Every rank has its own. Keys: ``step``, ``merged``, ``seed``, ``world``, ``rank``, settings
        of the schedule, and by parameter ``anchor.NAME``, ``momentum.NAME``, ``first.NAME`` and
        ``second.NAME`` (residuals), ``flight.NAME`` (means that are not merged yet). CPU tensors
        and whole numbers; call it between steps. It waits for exchanges under way.
        """
        settings = {name: getattr(self.schedule, name) for name in COUNTS[1:]}
        out: State = {"step": self._at.step, "merged": self._at.merged, "seed": self.reducer.seed}
        out |= settings
        out |= self._flights.tensors()
        out |= {key: t.to("cpu", copy=True) for key, t in self.anchors.tensors().items()}
        return out | self.reducer.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor | int], *, strict: bool = True) -> None:
        """Go on where ``state_dict`` was taken; model and inner optimiser are loaded by the caller.

        All ranks load, between the same two steps. In the next exchange they compare what they have
        loaded, and raise ``AgreementError`` if it differs. With another number of ranks, residuals
        of owned shards are dropped.

        Args:
            state: what ``state_dict`` returned on the rank with this number.
            strict: ``False`` after the model has changed: what is kept of parameters that are gone,
                or have another shape, is dropped. New parameters are anchored where they are.

        Raises:
            ConfigError: keys are missing, the schedule is another one, or, if ``strict``, anchors
                or residuals belong to other parameters.
        """
        check_schedule(state, self.schedule)
        ours, rest = ours_and_rest(state)
        flying = {p: self.fragments[p] for p in self.schedule.in_flight(int(state["step"]))}
        wanted = self.anchors.tensors()
        for names in flying.values():
            wanted |= {f"flight.{n}": self.anchors.values[n] for n in names}
        fitted = fitting(ours, wanted, strict=strict)
        known = self.reducer.known(rest, strict)
        rank, world = self._flights.rank, self._flights.world
        self.reducer.load_state_dict(known, rank=rank, world=world, strict=strict)
        self._flights.clear()
        self.anchors.load(fitted)
        for fragment, names in flying.items():
            there = {n: fitted[f"flight.{n}"] for n in names if f"flight.{n}" in fitted}
            self._flights.load(fragment, there)
        self.reducer.seed = int(state["seed"])
        self._at = Position(int(state["step"]), int(state["merged"]))
        merged = self.schedule.merged(self._at.step)
        self._settled = set() if self.mixing or merged is None else {merged}

    def __getstate__(self) -> dict[str, Any]:
        raise ConfigError("LocalSteps is not picklable; save its state_dict()")


def _channel(group: Any) -> LinkChannel:
    return LinkChannel(control_link(group))


def _closed() -> TrainingError:
    return TrainingError("these local steps were closed; to train on, make new ones")
