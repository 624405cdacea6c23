"""Threads that exchange, each in the order in which its jobs came.

On gloo, collectives that are issued from callbacks of futures run on whatever thread is free. Their
order then differs between ranks, and they abort or hang (pytorch#48478). Here the hook only
enqueues; a worker alone issues collectives on its group. Two of them take buckets in turn:

    worker 0   code 0 | wire 0 | decode 0   code 2 | wire 2 | ...
    worker 1            code 1 | wire 1 | decode 1   code 3 | ...

While one waits for the wire, the other codes. DDP hands out buckets in the same order on all ranks:
so the order of collectives on every group is the same, whichever worker is ahead.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradcodec.distributed.exchange.link import backends_of
from gradcodec.distributed.wrappers.torch_compat import sister_group
from gradcodec.errors import TrainingError

logger = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_WORKERS = 2

Future = torch.futures.Future


class Worker:
    """A daemon thread with a first-in-first-out queue.

    It ends at ``stop``, when the interpreter exits, and within a second of
    ``destroy_process_group``. It holds no reference to its ``CompressState``, so that a state that
    nobody uses any more can be collected.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Tensor], Future[Tensor]] | None]
        self._jobs = queue.SimpleQueue()
        self.failure: BaseException | None = None
        self._told = False
        self._waiting = 0
        self._streams: dict[torch.device, Any] = {}
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gradcodec-exchange", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], Tensor], future: Future[Tensor]) -> None:
        """Do ``job`` after all earlier ones and complete ``future`` with its result or error."""
        with self._changed:
            self._waiting += 1
        self._jobs.put((job, future))

    def enqueue(self, work: Callable[[], Tensor], *tensors: Tensor) -> Future[Tensor]:
        """``submit`` on the side of the device: a future of ``work``, which may use ``tensors``.

        On CUDA the work runs on a stream of its own, which waits for what the caller's stream has
        been given so far. A future that knows its device records an event when it is completed, on
        the current stream of the thread that completes it: here this worker's. A wait for the
        future makes the waiting stream wait for that event.
        """
        future: Future[Tensor]
        device = tensors[0].device
        if device.type != "cuda":
            future = Future()
            self.submit(work, future)
            return future
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        ready = torch.cuda.current_stream(device).record_event()
        for tensor in tensors:
            tensor.record_stream(stream)
        future = Future(devices=[device])

        def work_on_stream() -> Tensor:
            torch.cuda.set_stream(stream)  # of the worker, for good
            stream.wait_event(ready)
            return work()

        self.submit(work_on_stream, future)
        return future

    def check(self) -> None:
        """Raise the error of a failed job, if one failed: the error itself the first time.

        Raises:
            TrainingError: the error was raised before; later exchanges cannot be trusted.
        """
        if self.failure is None:
            return
        if not self._told:
            self._told = True
            raise self.failure
        raise TrainingError(f"an earlier exchange failed: {self.failure}") from self.failure

    def wait(self) -> None:
        """Wait until every job is done.

        Raises:
            TrainingError: the thread has ended before that.
        """
        with self._changed:
            while self._waiting:
                if not self._changed.wait(_POLL_SECONDS) and not self._thread.is_alive():
                    raise TrainingError(
                        "the thread that exchanges gradients has ended before they were exchanged: "
                        "its state was closed, or the process group destroyed"
                    )

    def stop(self, timeout: float = 5.0) -> None:
        """End the thread after the jobs that are queued; gives up waiting after ``timeout``.

        A thread that waits for a dead rank ends at its group's timeout. As a daemon it does not
        keep the process alive.
        """
        self._jobs.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            try:
                item = self._jobs.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if not dist.is_initialized():
                    return
                continue
            if item is None:
                return
            job, future = item
            del item
            try:
                if self.failure is not None:
                    raise self.failure
                result = job()
            # The thread that waits for the future must get every error, whatever it is.
            except BaseException as err:
                if self.failure is None:
                    # Logged with its traceback, which a future does not keep.
                    logger.exception("gradcodec: an exchange of gradients failed")
                    self.failure = err
                future.set_exception(err)  # type: ignore[arg-type]
            else:
                future.set_result(result)
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()
            del job, future


class Turns:
    """Workers that take buckets in turn, each with a group of the same ranks.

    All ranks make it together. NCCL does not promise that collectives of two groups on one GPU make
    progress side by side, so there one worker does it all.

    Args:
        group: of these ranks; ``None`` is the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        over_gloo = set(backends_of(group).values()) == {"gloo"}
        self.groups = [sister_group(group) for _ in range(_WORKERS if over_gloo else 1)]
        self.workers = [Worker() for _ in self.groups]

    def enqueue(
        self, number: int, work: Callable[[dist.ProcessGroup], Tensor], *tensors: Tensor
    ) -> Future[Tensor]:
        """A future of ``work``, done on the group of the worker whose turn ``number`` is."""
        turn = number % len(self.workers)
        group = self.groups[turn]
        return self.workers[turn].enqueue(lambda: work(group), *tensors)

    def check(self) -> None:
        """As ``Worker.check``, of all workers."""
        for worker in self.workers:
            worker.check()

    def finish(self) -> None:
        """Wait until every job of every worker is done, then ``check``."""
        for worker in self.workers:
            worker.wait()
        self.check()

    def stop(self) -> None:
        """End the threads after the jobs that are queued."""
        for worker in self.workers:
            worker.stop()
