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

from gradcodec.distributed import shims
from gradcodec.distributed.auto import Choice as AutoChoice
from gradcodec.distributed.fsdp1 import sharded_state
from gradcodec.distributed.link import Link
from gradcodec.distributed.policy import Choice, Policy, Rules
from gradcodec.distributed.reducer import BucketReducer, Slot
from gradcodec.distributed.traffic import Traffic
from gradcodec.distributed.worker import Worker
from gradcodec.errors import ConfigError, TrainingError
from gradcodec.parameters import NamedParameters, named_parameters

logger = logging.getLogger("gradcodec.distributed")

Future = torch.futures.Future

AUTO = "auto"
_AUTO_CODEC = "int4"


class CompressState:
    """What ``compress_hook`` works with: one per model and rank.

        state = CompressState(model, codec="int4")
        ddp.register_comm_hook(state, compress_hook)

    Every parameter is coded by itself and cut among the ranks by its name, so that results do not
    depend on buckets; residuals belong to names. All ranks construct it with equal arguments and
    get gradients with equal bits.

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
            codec=codec,
            error_feedback=error_feedback,
            start_step=start_step,
            min_numel=min_numel,
            rules=rules,
            seed=seed,
            log_every=log_every,
        )
        if self.sharded is not None:
            return
        if error_feedback not in (True, False, AUTO):
            raise ConfigError(
                f"expected error_feedback of True, False or 'auto', got {error_feedback!r}"
            )
        if type(start_step) is not int or start_step < 0:
            raise ConfigError(f"expected start_step of 0 or more, got {start_step!r}")
        for name, every in (("log_every", log_every), ("nmse_every", nmse_every)):
            if every is not None and (type(every) is not int or every < 1):
                raise ConfigError(f"expected {name} of 1 or more or None, got {every!r}")
        parameters = named_parameters(model)
        self._names = {id(p): n for n, p in parameters.items()}
        self._parameters = list(parameters.values())  # an id is only good while its object lives
        shapes = {n: tuple(p.shape) for n, p in parameters.items()}
        if process_group is None and isinstance(model, DistributedDataParallel):
            process_group = model.process_group
        self.process_group = process_group
        self.auto: AutoChoice | None = None
        self.codec = codec
        if isinstance(codec, str) and codec.split(":")[0] == AUTO:
            self.auto = AutoChoice()
            codec = codec.partition(":")[2] or _AUTO_CODEC
        self.start_step = start_step
        self.log_every, self.nmse_every = log_every, nmse_every
        feedback = None if error_feedback == AUTO else bool(error_feedback)
        policy = Policy(shapes, codec, min_numel, rules)
        self.reducer = BucketReducer(policy, seed, feedback, shapes)
        # Nothing is coded anywhere, ``codec="fp32"``: then DDP's own all-reduce is the fastest way.
        self._exact = policy.exact and self.auto is None
        self.step = 0
        self.traffic = Traffic()
        self._world = self._rank = 0
        self._pending: Mapping[str, Tensor | int] | None = None
        self._own_group: dist.ProcessGroup | None = None
        self._worker: Worker | None = None
        self._closed = False
        self._streams: dict[torch.device, Any] = {}
        if dist.is_initialized():
            self._start()

    # -- the hook's side: called by autograd, in bucket order ---------------------------------

    def submit(self, bucket: Any) -> Future[Tensor]:
        """Enqueue a bucket; its future holds the bucket's buffer with the mean in it."""
        self._start()
        worker, step = self._worker, self.step
        if self._closed:
            raise TrainingError("the state was closed")
        if worker is not None and worker.failure is not None:
            raise TrainingError(f"an earlier exchange failed: {worker.failure}") from worker.failure
        buffer, last = bucket.buffer(), bool(bucket.is_last())
        compress = step >= self.start_step and (self.auto is None or self.auto.compress)
        plain = self.auto is not None and not compress and step >= self.start_step
        untouched = self._exact or (plain and self.auto is not None and not self.auto.measuring)
        if last:
            self.step += 1
        slots = []
        if not buffer.is_sparse:
            slots = self._slots(buffer, bucket.parameters(), bucket.gradients())
        future: Future[Tensor]
        if worker is None:  # a world of one
            future = Future()
            future.set_result(buffer)
            return future
        if untouched and not buffer.is_sparse:
            future = self._plain(buffer)
            if last:
                self._log(step)
            return future

        def work() -> Tensor:
            if buffer.is_sparse or plain:
                mean = self._dense(buffer)
            else:
                mean = self._reduce(buffer, slots, step, compress)
            if last:
                self._step_done(step, buffer.device)
            return mean

        if buffer.device.type != "cuda":
            future = Future()
            worker.submit(work, future)
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
        return future

    def _slots(self, buffer: Tensor, parameters: list[Tensor], views: list[Tensor]) -> list[Slot]:
        slots, base = [], buffer.storage_offset()
        for parameter, view in zip(parameters, views, strict=True):
            name = self._names.get(id(parameter))
            if name is None:
                raise ConfigError(
                    f"a parameter of shape {tuple(parameter.shape)} is not one that this state was "
                    "made for; make it from the model that is trained, after changing the model"
                )
            at = view.storage_offset() - base
            slots.append(Slot(name, buffer[at : at + view.numel()], view))
        if sum(s.flat.numel() for s in slots) != buffer.numel():
            raise ConfigError(f"expected a bucket of its parameters, got {buffer.numel()} elements")
        return slots

    def _plain(self, buffer: Tensor) -> Future[Tensor]:
        """What ``DistributedDataParallel`` does without a hook; its seconds are not counted."""
        dense = buffer.numel() * buffer.element_size()
        self.traffic += Traffic(dense, 2 * (self._world - 1) * dense // self._world)
        buffer.div_(self._world)
        work = dist.all_reduce(buffer, group=self.process_group, async_op=True)
        assert work is not None
        future: Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
        return future

    # -- the worker's side ------------------------------------------------------------------

    def _reduce(self, buffer: Tensor, slots: list[Slot], step: int, compress: bool) -> Tensor:
        link = Link(self._own_group, buffer.device)
        link.meter.dense = buffer.numel() * buffer.element_size()
        if compress:
            measure = self.nmse_every is not None and step % self.nmse_every == 0
            self.reducer.reduce(slots, link, step, measure=measure)
        else:
            self.reducer.reduce_raw(slots, link, step)
        self.traffic += link.meter.traffic
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
        self.traffic += link.meter.traffic
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
        if not dist.is_initialized():
            raise ConfigError("torch.distributed is not initialised")
        rank, self._world = (
            dist.get_rank(self.process_group),
            dist.get_world_size(self.process_group),
        )
        if rank < 0:
            raise ConfigError("expected a process_group that this process is a member of")
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

    def close(self) -> None:
        """End the thread. The hook of a closed state raises."""
        self._closed = True
        if self._worker is not None:
            self._worker.stop()

    # -- what it knows --------------------------------------------------------------------------

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

        With another number of ranks, residuals of the first shot and of low-rank parameters are
        kept and those of owned parts dropped: training goes on, not to the bit.

        Raises:
            ConfigError: keys are missing, or belong to parameters that are not here.
        """
        if self.sharded is not None:
            self.sharded.load_state_dict(state)
            return
        missing = [k for k in ("step", "seed") if k not in state]
        if missing:
            raise ConfigError(f"expected the keys 'step' and 'seed', {missing} are missing")
        known = set(self._names.values())
        strangers = [k for k in state if "." in k and k.partition(".")[2] not in known]
        if strangers:
            raise ConfigError(f"a state of other parameters: {strangers[0]!r} is not of this model")
        if self._world:
            self._load(state)
        else:
            self._pending = dict(state)

    def _load(self, state: Mapping[str, Tensor | int]) -> None:
        self.step = int(state["step"])
        self.reducer.seed = int(state["seed"])
        self.reducer.residuals.load_state_dict(state, rank=self._rank, world=self._world)
        for name, follower in self.reducer.followers.items():
            follower.load_state_dict(name, state)
        decision = int(state.get("auto", -1))
        if self.auto is not None and decision >= 0:
            self.auto.decision = bool(decision)

    def __getstate__(self) -> dict[str, Any]:
        raise ConfigError("a CompressState is not picklable; save its state_dict()")
