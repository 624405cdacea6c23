"""``CompressState``: the compressed gradients of a model in ``DistributedDataParallel``."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gradcodec.distributed.checks import (
    check_count,
    check_settings,
    check_state,
    real_shape,
    rule_pairs,
    trainable,
)
from gradcodec.distributed.compression import Closing, State, closed_error
from gradcodec.distributed.exchange.agreement import Agreed, LinkChannel, must_agree
from gradcodec.distributed.exchange.link import Link, control_link, place
from gradcodec.distributed.exchange.terms import choice_text, rules_text, tensor_text
from gradcodec.distributed.meter import Counters, Traffic, ring_nbytes
from gradcodec.distributed.plan import Choice, Plan, Rules
from gradcodec.distributed.trial import AUTO, Trial, is_auto, ladder, no_choice
from gradcodec.distributed.wrappers.bucket import BucketReducer, ParameterNames, Slot
from gradcodec.distributed.wrappers.fsdp1 import is_fsdp1
from gradcodec.distributed.wrappers.worker import Turns
from gradcodec.errors import ConfigError
from gradcodec.parameters import NamedParameters

_log = logging.getLogger(__name__)

Future = torch.futures.Future

_WHAT = "CompressState"


class CompressState(Closing):
    """What ``compress_hook`` works with: one per model and rank. It is a ``Compression``.

        state = CompressState(model, codec="int4")
        ddp.register_comm_hook(state, compress_hook)

    Every parameter is coded separately, and its name decides which ranks own its shards. Results
    therefore do not depend on buckets, and residuals belong to names. All ranks construct it
    together, with equal arguments (``log_every`` and ``nmse_every`` may differ), and get gradients
    with equal bits. If other arguments or the models differ, all ranks raise the same
    ``AgreementError``: when the state is made, or in the first step if there was no process group
    yet. Ranks compare again whenever DDP hands over a new bucket, which finds models whose
    buckets differ.

    Args:
        model: the model (plain, compiled or in ``DistributedDataParallel``), or named parameters.
        codec: a codec, a name of ``make_codec``, ``LowRank(...)``, ``"lowrank"``, or ``"auto"``,
            which times a few steps of each codec of a ladder, keeps the fastest, does not compress
            if that would lose time, and looks again every 2,000 steps (``trial``).
            ``"auto:int8,int4"`` names the codecs. ``"fp32"`` leaves gradients to the group's own
            all-reduce, as DDP without a hook does.
        process_group: the group of the data-parallel ranks; by default that of ``model`` if it is
            wrapped, else the default group. Exchanges run on new groups of the same ranks.
        error_feedback: ``True``, ``False``, or ``"auto"``: on for codecs that need it (see
            ``coding.wants_feedback``).
        start_step: steps before this one are averaged exactly, as warm-up.
        min_numel: smaller parameters are sent raw, in the same messages.
        rules: ``(pattern, codec)`` by parameter name, the first match wins:
            ``[("*.bias", "fp32"), ("*embed*", "int8")]``.
        seed: of stochastic rounding and first bases; equal on all ranks.
        quality: only with ``"auto"``, what it may lose: the largest relative squared error of a
            codec on Gaussian values. 0.02, the default, allows ``"int4"``, 0.15 ``"int2-rotated"``
            too, 0.4 ``"sign-rotated"``.
        log_every: steps between log lines, at level INFO.
        nmse_every: steps between measurements of what coding loses of each gradient, for ``stats``.

    Raises:
        ConfigError: a setting is wrong, a rule matches nothing, or the model is in FSDP; for FSDP
            call ``compress(model)``.
        AgreementError: ranks came with different models or settings.

    What to know:

    - Accumulate gradients under ``no_sync()``. Without it, every backward hands the hook the last
      *averaged* gradient plus the new one, and error feedback adds its residual each time.
    - Under a ``GradScaler`` residuals are in scaled units: a change of the scale shifts what is
      fed back in the next step by that factor, once.
    - If a parameter's gradient is all zeros on a rank (it is unused, or the rank has joined), no
      residual is added to it there. Gradients with NaN or Inf travel as they are; residuals stay
      finite.
    - Sparse gradients are averaged uncompressed.
    - Error feedback takes 4 bytes per parameter, and 4 per value of the shards that a rank owns.
    - A copy of the model (``copy.deepcopy``, ``AveragedModel``) is not compressed. That is right
      for an average of weights; to train a copy, call ``compress(copy)`` on all ranks.
    """

    def __init__(
        self,
        model: NamedParameters,
        codec: Choice = "int4",
        process_group: dist.ProcessGroup | None = None,
        error_feedback: bool | str = "auto",
        start_step: int = 0,
        min_numel: int = 4096,
        rules: Rules | Sequence[tuple[str, Choice]] = (),
        seed: int = 0,
        log_every: int | None = None,
        nmse_every: int | None = None,
        quality: float | None = None,
    ) -> None:
        if process_group is None and isinstance(model, DistributedDataParallel):
            process_group = model.process_group
        self.process_group = process_group
        with must_agree(self._channel(), _WHAT) as mine:
            if is_fsdp1(model):
                raise ConfigError(
                    "CompressState is for DistributedDataParallel, got a model in "
                    "FullyShardedDataParallel: call compress(model, codec), which registers what "
                    "FSDP1 needs"
                )
            check_settings(
                error_feedback=error_feedback,
                seed=seed,
                start_step=start_step,
                log_every=log_every,
                nmse_every=nmse_every,
            )
            rules = rule_pairs(rules)
            parameters = trainable(model)
            shapes = {n: real_shape(p) for n, p in parameters.items()}
            self.codec = codec
            self.auto: Trial | None = None
            choices: tuple[Choice, ...] = (codec,)
            if is_auto(codec):
                choices = ladder(str(codec), quality)
                self.auto = Trial([str(choice) for choice in choices])
            elif quality is not None:
                raise no_choice(codec)
            feedback = None if error_feedback == AUTO else bool(error_feedback)
            self._plans = [Plan(shapes, c, min_numel, rules, feedback) for c in choices]
            plan = self._plans[0]
            texts = [choice_text(choice) for choice in choices]
            self._terms = {
                "codec": ", ".join([AUTO, *texts] if self.auto else texts),
                "error_feedback": str(error_feedback),
                "start_step": str(start_step),
                "min_numel": str(min_numel),
                "rules": rules_text(rules),
                "seed": str(seed),
                **plan.terms(parameters),
            }
            mine.update(self._terms)
        self.start_step, self.nmse_every = start_step, nmse_every
        self.reducer = BucketReducer(plan, seed)
        self.counters = Counters(log_every)
        self._names = ParameterNames(parameters)
        # If nothing is coded (``codec="fp32"``), DDP's own all-reduce is the fastest way.
        self._exact = plan.exact and self.auto is None
        self._step = 0
        self._world = self._rank = 0
        self._pending: tuple[Mapping[str, Tensor | int], bool] | None = None
        self._turns: Turns | None = None
        self._agreed = Agreed()
        if dist.is_initialized():
            self._start()

    # -- the hook's side: called by autograd, in bucket order ---------------------------------

    def submit(self, bucket: Any) -> Future[Tensor]:
        """Enqueue a bucket; its future holds the bucket's buffer with the mean in it.

        After the last bucket it waits for all of them, which DDP would do next in any case. An
        error that is raised here reaches the caller of ``backward()`` as it is; of an error in a
        future, DDP keeps only the message, in a ``RuntimeError``.
        """
        self._start()
        if self.closed:
            raise closed_error()
        turns, step = self._turns, self._step
        if turns is not None:
            turns.check()
        buffer, last = bucket.buffer(), bool(bucket.is_last())
        names = self._names.names(bucket)
        rung, dense = self._way(step)
        if last:
            self._step += 1
        if turns is None:  # a world of one
            alone: Future[Tensor] = Future()
            alone.set_result(buffer)
            return alone
        key = (names, buffer.dtype, buffer.is_sparse)
        measuring = self.auto is not None and self.auto.measuring
        plain = dense and not measuring and not self.reducer.residuals.has(names)
        if plain and not buffer.is_sparse and key in self._agreed:
            future = self._left_to_ddp(buffer)
        else:
            if rung and not dense and self._plans[rung - 1] is not self.reducer.plan:
                turns.finish()  # nobody else uses what is kept by the plan so far
                self.reducer.use(self._plans[rung - 1], self._rank, self._world)
            slots = [] if buffer.is_sparse else self._names.slots(bucket)

            def work(group: dist.ProcessGroup) -> Tensor:
                self._agree(key, names, buffer, step, rung, group)
                if buffer.is_sparse or dense:
                    return self._all_reduce(buffer, slots, group)
                return self._reduce(buffer, slots, step, rung, group)

            # What ranks may not agree on waits in one queue: its failure stops what follows.
            turn = bucket.index() if key in self._agreed else 0
            future = turns.enqueue(turn, work, buffer)
        if last:
            turns.finish()
            self._step_done(step, buffer.device)
        return future

    def _way(self, step: int) -> tuple[int, bool]:
        """By which plan a step's gradients are coded, and whether a dense all-reduce takes them.

        Plans count from 1. If neither (before ``start_step``), gradients are averaged exactly, by
        our own two shots.
        """
        started = step >= self.start_step
        rung = 0 if not started else 1 if self.auto is None else self.auto.rung
        return rung, self._exact or (started and not rung)

    def _left_to_ddp(self, buffer: Tensor) -> Future[Tensor]:
        """What ``DistributedDataParallel`` does without a hook; its seconds are not counted."""
        dense = buffer.numel() * buffer.element_size()
        self.counters.add(Traffic(dense, ring_nbytes(dense, self._world)))
        buffer.div_(self._world)
        work = dist.all_reduce(buffer, group=self.process_group, async_op=True)
        assert work is not None
        future: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
        return future

    # -- the workers' side ------------------------------------------------------------------

    def _agree(
        self,
        key: object,
        names: Sequence[str],
        buffer: Tensor,
        step: int,
        rung: int,
        group: dist.ProcessGroup,
    ) -> None:
        """Compare ranks before a bucket that is new: DDP's first, rebuilt and resumed ones."""
        if key in self._agreed:
            return
        link = control_link(group)
        self._agreed.ensure(
            key,
            link,
            "a bucket of gradients",
            lambda: {
                "parameters": ", ".join(names),
                "gradients": tensor_text(buffer),
                "step": str(step),
                "compressed": str(bool(rung)) if self.auto is None else self.auto.names[rung],
                "decision of auto": str(self.auto and self.auto.decision),
                "seed": str(self.reducer.seed),
                **self.reducer.terms(names),
            },
        )
        self.counters.add(link.meter.traffic)

    def _reduce(
        self, buffer: Tensor, slots: list[Slot], step: int, rung: int, group: dist.ProcessGroup
    ) -> Tensor:
        link = Link(group, buffer.device)
        link.meter.dense = buffer.numel() * buffer.element_size()
        if rung:
            measure = self.nmse_every is not None and step % self.nmse_every == 0
            self.reducer.reduce(slots, link, step, measure=measure)
        else:
            self.reducer.reduce_raw(slots, link, step)
        self.counters.add(link.meter.traffic)
        return buffer

    def _all_reduce(self, buffer: Tensor, slots: list[Slot], group: dist.ProcessGroup) -> Tensor:
        link = Link(group, buffer.device)
        self.reducer.send_rest(slots, link.rank, link.size)
        size = buffer._values().numel() if buffer.is_sparse else buffer.numel()
        link.meter.dense = size * buffer.element_size()
        link.meter.wire = ring_nbytes(link.meter.dense, self._world)
        with link.meter.phase("exchange"):
            mean = buffer / self._world if buffer.is_sparse else buffer.div_(self._world)
            dist.all_reduce(mean, group=group)
        self.counters.add(link.meter.traffic)
        return mean

    def _step_done(self, step: int, device: torch.device) -> None:
        if self.auto is not None and step >= self.start_step:
            assert self._turns is not None
            if self.auto.step_done(self._turns.groups[0], device) and not self._rank:
                _log.info("gradcodec: %s", self.auto.describe())
        self.counters.log(step + 1)

    # -- life -------------------------------------------------------------------------------

    def _start(self) -> None:
        """Make groups and threads; if there is no process group yet, do so at the first bucket."""
        if self._world:
            return
        rank, world = place(self.process_group)
        if self._early:
            with must_agree(self._channel(), _WHAT) as mine:
                mine.update(self._terms)
        self._world = world
        if self._world > 1:
            self._turns = Turns(self.process_group)
            rank = dist.get_rank(self._turns.groups[0])
            weakref.finalize(self, self._turns.stop)
        elif self.auto is not None:
            self.auto.settle(0)  # nothing is exchanged
        self._rank = rank
        if self._pending is not None:
            self._load(*self._pending)
            self._pending = None

    def _channel(self) -> LinkChannel | None:
        """A channel over the ranks' process group; ``None`` if there is none yet."""
        self._early = not dist.is_initialized()
        return None if self._early else LinkChannel(control_link(self.process_group))

    def close(self) -> None:
        """End the threads. A backward pass that comes after it raises ``TrainingError``."""
        super().close()
        if self._turns is not None:
            self._turns.stop()

    # -- what it knows --------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps so far."""
        return self._step

    @property
    def traffic(self) -> Traffic:
        """Bytes and seconds so far, of this rank."""
        return self.counters.traffic

    def stats(self) -> dict[str, Any]:
        """Counters by the keys of ``Compression.stats``; names are those of parameters."""
        return self.counters.stats(
            steps=self.step,
            dense_wire=ring_nbytes(self.traffic.dense, self._world),
            residual_bytes=self.reducer.residual_nbytes,
            codecs=self.reducer.plan.labels(),
            nmse=self.reducer.nmse,
            auto=None if self.auto is None else self.auto.describe(),
        )

    def state_dict(self) -> State:
        """What a resumed run needs to go on with equal bits: a flat dict of CPU tensors and ints.

        Every rank has its own. Keys: ``step``, ``seed``, ``world``, ``rank``, ``auto`` (-1 no
        decision, 0 dense, else the rung), ``rung`` (the codec whose residuals these are),
        ``first.NAME`` and ``second.NAME`` (residuals), ``start.NAME``, ``basis.NAME`` and
        ``error.NAME`` (low rank). Call it between steps.
        """
        out: State = {"step": self.step, "seed": self.reducer.seed}
        if self.auto is not None:
            out["auto"] = -1 if self.auto.decision is None else self.auto.decision
            out["rung"] = 1 + self._plans.index(self.reducer.plan)
        out.update(self.reducer.state_dict())
        if self._world:
            out["world"], out["rank"] = self._world, self._rank
        return out

    def load_state_dict(self, state: Mapping[str, Tensor | int], *, strict: bool = True) -> None:
        """Go on where ``state_dict`` was taken; buckets may be others.

        All ranks load, between the same two steps. In the next step they compare what they have
        loaded, except residuals, which differ by rank, and raise ``AgreementError`` if it differs.

        With another number of ranks, residuals of the first shot and of low-rank parameters are
        kept, and those of owned shards are dropped: training goes on, but not with equal bits, and
        ``auto`` decides anew.

        Args:
            state: what ``state_dict`` returned.
            strict: ``False`` after the model has changed: the state of parameters that are gone, or
                have another shape, is dropped with a log line; new ones start at zero.

        Raises:
            ConfigError: keys are missing or, if ``strict``, belong to parameters that are not here.
        """
        check_state(state, "step", "seed")
        check_count("step", int(state["step"]))
        known = self.reducer.known(state, strict)
        if self._world:
            self._load(known, strict)
        else:
            self._pending = (known, strict)

    def _load(self, state: Mapping[str, Tensor | int], strict: bool) -> None:
        decision = int(state.get("auto", -1))
        if self.auto is not None:
            rung = int(state.get("rung", 1))  # states of earlier versions had one codec
            if not (1 <= rung <= len(self._plans) and decision <= len(self._plans)):
                raise ConfigError(
                    f"expected a state of auto with {', '.join(self.auto.names[1:])}, got one that "
                    f"uses codec {max(rung, decision)} of its own list"
                )
            self.reducer.plan = self._plans[rung - 1]
        self.reducer.load_state_dict(state, rank=self._rank, world=self._world, strict=strict)
        self._agreed.clear()  # the terms may have changed
        self._step = int(state["step"])
        self.reducer.seed = int(state["seed"])
        alike = int(state.get("world", self._world)) == self._world
        if self.auto is not None and decision >= 0 and alike:
            self.auto.settle(decision)
        elif self.auto is not None and self._world > 1:
            self.auto.restart()

    def __deepcopy__(self, memo: object) -> CopiedState:
        # A copy of a DDP model has its own reducer, without a hook. What this state holds (a
        # thread, a group, residuals of this rank) is of no use to it.
        return CopiedState()

    def __getstate__(self) -> dict[str, Any]:
        raise ConfigError("a CompressState is not picklable; save its state_dict()")


class CopiedState:
    """Takes the place of the ``CompressState`` in a copy of a compressed DDP model."""
