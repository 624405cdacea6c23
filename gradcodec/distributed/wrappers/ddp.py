"""The state of the hook: policy, residuals, thread, counters, checkpoint."""

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
from gradcodec.distributed.exchange import terms
from gradcodec.distributed.exchange.agreement import Agreed, LinkChannel, alike
from gradcodec.distributed.exchange.link import Link, control_link, place
from gradcodec.distributed.meter import Traffic
from gradcodec.distributed.plan import Choice, Policy, Rules
from gradcodec.distributed.trial import Choice as AutoChoice
from gradcodec.distributed.wrappers import torch_compat as shims
from gradcodec.distributed.wrappers.bucket import BucketReducer
from gradcodec.distributed.wrappers.fsdp1 import sharded_state
from gradcodec.distributed.wrappers.slots import Named, Slot
from gradcodec.distributed.wrappers.worker import Worker
from gradcodec.errors import ConfigError, TrainingError
from gradcodec.parameters import NamedParameters

logger = logging.getLogger("gradcodec.distributed")

Future = torch.futures.Future

AUTO = "auto"
_AUTO_CODEC = "int4"
_WHAT = "CompressState"
_KEYS = ("step", "seed", "auto", "world", "rank")


class CompressState:
    """What ``compress_hook`` works with: one per model and rank.

        state = CompressState(model, codec="int4")
        ddp.register_comm_hook(state, compress_hook)

    Every parameter is coded by itself and cut among the ranks by its name, so that results do not
    depend on buckets; residuals belong to names. All ranks construct it together, with equal
    arguments (``log_every`` and ``nmse_every`` may differ), and get gradients with equal bits.
    Where something differs that must not, all of them raise the same ``AgreementError``: when the
    state is made, or in the first step if there is no process group before; and wherever a bucket
    comes that was not there before, so that models that go different ways are found out as well.

    Args:
        model: the model (plain, compiled or in ``DistributedDataParallel``), or named parameters.
        codec: a codec, a name of ``make_codec``, ``LowRank(...)``, ``"lowrank"``, or ``"auto"``
            (also ``"auto:int8"`` and so on; plain ``"auto"`` tries ``"int4"``): measures a few
            steps and does not compress where that would lose time.
            ``"fp32"`` leaves gradients to the group's own all-reduce, as DDP without a hook does.
        process_group: the group of the data-parallel ranks; by default that of ``model`` if it is
            wrapped, else the default group. Exchanges run on a new group of the same ranks.
        error_feedback: ``True``, ``False``, or ``"auto"``: where it helps (see
            ``routes.wants_feedback``).
        start_step: steps before this one are averaged exactly, as warm-up.
        min_numel: smaller parameters are sent raw, in the same messages.
        rules: ``(pattern, codec)`` by parameter name, the first match wins:
            ``[("*.bias", "fp32"), ("*embed*", "int8")]``.
        seed: of stochastic rounding and first bases; equal on all ranks.
        log_every: log a line every so many steps, at level INFO.
        nmse_every: measure what coding loses of each gradient every so many steps, for ``stats``.

    Raises:
        ConfigError: a setting is wrong, or a rule matches nothing.
        AgreementError: ranks came with different models or settings.

    What to know:

    - Accumulate gradients under ``no_sync()``. Without it, every backward hands the hook the last
      *averaged* gradient plus the new one, and error feedback adds its residual each time.
    - Under a ``GradScaler`` residuals are in scaled units: a change of the scale shifts what is
      fed back in the next step by that factor, once.
    - A parameter whose gradient is all zeros on a rank (unused, a rank that has joined) gets no
      residual added there. Gradients with NaN or Inf travel as they are; residuals stay finite.
    - Sparse gradients are averaged uncompressed.
    - Error feedback takes 4 bytes per parameter and rank.
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
    ) -> None:
        #: Of a model in FSDP1: all that follows is then its business. Reductions are synchronous
        #: there, without buckets or a thread.
        self.sharded = sharded_state(
            model,
            {"process_group": process_group, "nmse_every": nmse_every},
            codec=codec,
            error_feedback=error_feedback,
            start_step=start_step,
            min_numel=min_numel,
            rules=rules,
            seed=seed,
            log_every=log_every,
        )
        self._worker: Worker | None = None
        self._closed = False
        if self.sharded is not None:
            return
        if process_group is None and isinstance(model, DistributedDataParallel):
            process_group = model.process_group
        self.process_group = process_group
        with alike(self._channel(), _WHAT) as mine:
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
            self.auto: AutoChoice | None = None
            if isinstance(codec, str) and codec.split(":")[0] == AUTO:
                self.auto = AutoChoice()
                codec = _AUTO_CODEC if codec == AUTO else codec.partition(":")[2]
            feedback = None if error_feedback == AUTO else bool(error_feedback)
            policy = Policy(shapes, codec, min_numel, rules)
            self._terms = {
                "codec": (f"{AUTO}, " if self.auto else "") + terms.choice_text(codec),
                "error_feedback": str(error_feedback),
                "start_step": str(start_step),
                "min_numel": str(min_numel),
                "rules": terms.rules_text(rules),
                "seed": str(seed),
                **terms.parameter_terms(parameters, policy, feedback),
            }
            mine.update(self._terms)
        self._named = Named(parameters)
        self.start_step = start_step
        self.log_every, self.nmse_every = log_every, nmse_every
        self.reducer = BucketReducer(policy, seed, feedback, shapes)
        # Nothing is coded anywhere, ``codec="fp32"``: then DDP's own all-reduce is the fastest way.
        self._exact = policy.exact and self.auto is None
        self._step = 0
        self._traffic = Traffic()
        self._world = self._rank = 0
        self._pending: Mapping[str, Tensor | int] | None = None
        self._own_group: dist.ProcessGroup | None = None
        self._streams: dict[torch.device, Any] = {}
        self._buckets = Agreed()
        if dist.is_initialized():
            self._start()

    # -- the hook's side: called by autograd, in bucket order ---------------------------------

    def submit(self, bucket: Any) -> Future[Tensor]:
        """Enqueue a bucket; its future holds the bucket's buffer with the mean in it.

        With the last one, wait for all: DDP does that next in any case, but of an error in a future
        it keeps the message alone, in a ``RuntimeError``, where one that is raised here reaches the
        caller of ``backward()`` as it is.
        """
        if self.sharded is not None:
            raise ConfigError("the state of an FSDP1 model has no buckets; use compress(model)")
        self._start()
        worker, step = self._worker, self._step
        if self._closed:
            raise TrainingError("the state was closed")
        if worker is not None:
            worker.check()
        buffer, last = bucket.buffer(), bool(bucket.is_last())
        compress = step >= self.start_step and (self.auto is None or self.auto.compress)
        plain = self.auto is not None and not compress and step >= self.start_step
        untouched = self._exact or (plain and self.auto is not None and not self.auto.measuring)
        if last:
            self._step += 1
        slots = []
        if not buffer.is_sparse:
            slots = self._named.slots(bucket)
        future: Future[Tensor]
        if worker is None:  # a world of one
            future = Future()
            future.set_result(buffer)
            return future
        names = self._named.names(bucket)
        key = (names, buffer.dtype, buffer.is_sparse)
        if untouched and not buffer.is_sparse and key in self._buckets:
            future = self._plain(buffer)
            if last:
                worker.finish()
                self._log(step)
            return future

        def work() -> Tensor:
            self._agree(key, names, buffer, step, compress)
            if buffer.is_sparse or plain or untouched:
                mean = self._dense(buffer)
            else:
                mean = self._reduce(buffer, slots, step, compress)
            if last:
                self._step_done(step, buffer.device)
            return mean

        if buffer.device.type != "cuda":
            future = Future()
            worker.submit(work, future)
            if last:
                worker.finish()
            return future
        # The gradients are ready where autograd's stream is now. A future that knows its device
        # records an event on the stream that is current where it is completed, which is the
        # worker's, and DDP's wait for the future makes its own stream wait for that event.
        device = buffer.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        ready = torch.cuda.current_stream(device).record_event()
        buffer.record_stream(stream)
        future = Future(devices=[device])

        def work_on_stream() -> Tensor:
            torch.cuda.set_stream(stream)  # of the worker, for good
            stream.wait_event(ready)
            return work()

        worker.submit(work_on_stream, future)
        if last:
            worker.finish()
        return future

    def _plain(self, buffer: Tensor) -> Future[Tensor]:
        """What ``DistributedDataParallel`` does without a hook; its seconds are not counted."""
        dense = buffer.numel() * buffer.element_size()
        self._traffic += Traffic(dense, 2 * (self._world - 1) * dense // self._world)
        buffer.div_(self._world)
        work = dist.all_reduce(buffer, group=self.process_group, async_op=True)
        assert work is not None
        future: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
        return future

    # -- the worker's side ------------------------------------------------------------------

    def _agree(
        self, key: object, names: Sequence[str], buffer: Tensor, step: int, compress: bool
    ) -> None:
        """Before a bucket that was not there before: DDP's first, rebuilt and resumed ones."""
        if key in self._buckets:
            return
        link = control_link(self._own_group)
        self._buckets.ensure(
            key,
            link,
            "a bucket of gradients",
            lambda: {
                "parameters": ", ".join(names),
                "gradients": terms.tensor_text(buffer),
                "step": str(step),
                "compressed": str(compress),
                "decision of auto": str(self.auto and self.auto.decision),
                "seed": str(self.reducer.seed),
                **terms.follower_terms(self.reducer.followers, names),
            },
        )
        self._traffic += link.meter.traffic

    def _reduce(self, buffer: Tensor, slots: list[Slot], step: int, compress: bool) -> Tensor:
        link = Link(self._own_group, buffer.device)
        link.meter.dense = buffer.numel() * buffer.element_size()
        if compress:
            measure = self.nmse_every is not None and step % self.nmse_every == 0
            self.reducer.reduce(slots, link, step, measure=measure)
        else:
            self.reducer.reduce_raw(slots, link, step)
        self._traffic += link.meter.traffic
        return buffer

    def _dense(self, buffer: Tensor) -> Tensor:
        link = Link(self._own_group, buffer.device)
        size = buffer._values().numel() if buffer.is_sparse else buffer.numel()
        link.meter.dense = size * buffer.element_size()
        link.meter.wire = 2 * (self._world - 1) * link.meter.dense // self._world
        with link.meter.phase("exchange"):
            if buffer.is_sparse:
                buffer = buffer / self._world
            else:
                buffer.div_(self._world)
            dist.all_reduce(buffer, group=self._own_group)
        self._traffic += link.meter.traffic
        return buffer

    def _step_done(self, step: int, device: torch.device) -> None:
        if self.auto is not None and step >= self.start_step:
            assert self._own_group is not None
            if self.auto.step_done(self._own_group, device):
                logger.info("gradcodec: %s", self.auto.describe())
        self._log(step)

    def _log(self, step: int) -> None:
        if self.log_every is not None and (step + 1) % self.log_every == 0:
            t = self.traffic
            logger.info(
                "gradcodec: after %d steps: %.1f MB of gradients, %.2f MB sent by this rank; "
                "seconds: encode %.2f, exchange %.2f, decode %.2f",
                step + 1,
                t.dense / 1e6,
                t.wire / 1e6,
                t.encode,
                t.exchange,
                t.decode,
            )

    # -- life -------------------------------------------------------------------------------

    def _start(self) -> None:
        """Make group and thread: at once, or at the first bucket if there is no group yet."""
        if self._world:
            return
        rank, world = place(self.process_group)
        if self._early:
            with alike(self._channel(), _WHAT) as mine:
                mine.update(self._terms)
        self._world = world
        if self._world > 1:
            self._own_group = shims.sister_group(self.process_group)
            rank = dist.get_rank(self._own_group)
            self._worker = Worker()
            weakref.finalize(self, self._worker.stop)
        elif self.auto is not None:
            self.auto.decision = False  # nothing is exchanged
        self._rank = rank
        if self._pending is not None:
            self._load(self._pending)
            self._pending = None

    def _channel(self) -> LinkChannel | None:
        """To the other ranks, by the group they share already; ``None`` before there is one."""
        self._early = not dist.is_initialized()
        return None if self._early else LinkChannel(control_link(self.process_group))

    def close(self) -> None:
        """End the thread. The hook of a closed state raises; FSDP1 has neither."""
        self._closed = True
        if self._worker is not None:
            self._worker.stop()

    # -- what it knows --------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Steps so far."""
        return self._step if self.sharded is None else self.sharded.step

    @property
    def traffic(self) -> Traffic:
        """Bytes and seconds so far, of this rank."""
        return self._traffic if self.sharded is None else self.sharded.traffic

    def stats(self) -> dict[str, Any]:
        """Counters since construction, of this rank; plain numbers and strings.

        ``dense_bytes`` of gradients, ``dense_wire_bytes`` that a ring all-reduce would have sent,
        ``wire_bytes`` sent, ``encode_seconds``, ``exchange_seconds`` (waiting included),
        ``decode_seconds``, ``steps``, ``residual_bytes``; ``codecs`` by parameter; ``nmse`` by
        parameter where measured (``nmse_every``); ``auto``: the decision and why, or ``None``.
        """
        if self.sharded is not None:
            return self.sharded.stats()
        t, world = self.traffic, max(self._world, 1)
        followers = self.reducer.followers.values()
        errors = sum(4 * f.error.numel() for f in followers if f.error is not None)
        return {
            "steps": self.step,
            "dense_bytes": t.dense,
            "dense_wire_bytes": 2 * (world - 1) * t.dense // world,
            "wire_bytes": t.wire,
            "encode_seconds": t.encode,
            "exchange_seconds": t.exchange,
            "decode_seconds": t.decode,
            "residual_bytes": self.reducer.residuals.nbytes + errors,
            "codecs": self.reducer.policy.labels(),
            "nmse": dict(self.reducer.nmse),
            "auto": None if self.auto is None else self.auto.describe(),
        }

    def state_dict(self) -> dict[str, Tensor | int]:
        """What a resumed run needs to go on to the bit: a flat dict of CPU tensors and ints.

        Every rank has its own. Keys: ``step``, ``seed``, ``world``, ``rank``, ``auto`` (-1 no
        decision, 0, 1), ``first.NAME`` and ``second.NAME`` (residuals), ``start.NAME``,
        ``basis.NAME`` and ``error.NAME`` (low rank). Call it between steps.
        """
        if self.sharded is not None:
            return self.sharded.state_dict()
        out: dict[str, Tensor | int] = {"step": self.step, "seed": self.reducer.seed}
        if self.auto is not None:
            out["auto"] = -1 if self.auto.decision is None else int(self.auto.decision)
        out.update(self.reducer.residuals.state_dict())
        for name, follower in self.reducer.followers.items():
            out.update(follower.state_dict(name))
        if self._world:
            out["world"], out["rank"] = self._world, self._rank
        return out

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Go on where ``state_dict`` was taken; buckets may be others.

        All ranks load, between the same two steps. In the next one they compare what they have
        loaded but for residuals, which belong to each rank, and raise ``AgreementError`` where it
        differs.

        With another number of ranks, residuals of the first shot and of low-rank parameters are
        kept and those of owned parts dropped: training goes on, not to the bit.

        Raises:
            ConfigError: keys are missing, or belong to parameters that are not here.
        """
        if self.sharded is not None:
            self.sharded.load_state_dict(state)
            return
        check_state(state, "step", "seed")
        check_count("step", int(state["step"]))
        known = self.reducer.shapes
        strangers = [k for k in state if k not in _KEYS and k.partition(".")[2] not in known]
        if strangers:
            raise ConfigError(f"a state of other parameters: {strangers[0]!r} is not of this model")
        if self._world:
            self._load(state)
        else:
            self._pending = dict(state)

    def _load(self, state: Mapping[str, Tensor | int]) -> None:
        self.reducer.check_residuals(state, self._world)
        self._buckets.forget()
        self._step = int(state["step"])
        self.reducer.seed = int(state["seed"])
        self.reducer.residuals.load_state_dict(state, rank=self._rank, world=self._world)
        for name, follower in self.reducer.followers.items():
            follower.load_state_dict(name, state)
        decision = int(state.get("auto", -1))
        if self.auto is not None and decision >= 0:
            self.auto.decision = bool(decision)

    def __getstate__(self) -> dict[str, Any]:
        raise ConfigError("a CompressState is not picklable; save its state_dict()")
