"""Reductions that go on behind the backward pass, for wrappers that use a result at once.

FSDP asks for a reduction in the middle of the backward pass, and then does this with the result:

    output.div_(factor)            where FSDP2 scales after the reduction
    parameter.grad = output[...]   a view; or grad += ..., or a copy in another dtype

A view needs no values yet. So, where nothing else is done with them before the pass ends, the
reduction is left to a worker, and its result is written into the output when the pass ends:

    during the pass    output = 1, which FSDP2 scales | a worker reduces into a tensor of its own
    at its end         output = reduced / factor, where 1 / factor is what FSDP2 made of the ones

FSDP1 scales nothing: there the output is NaN until the pass ends, so that whoever reads a gradient
within the pass notices.

All reductions of a group go through the same workers, those that are waited for too: so ranks
reduce in the same order, even if one of them waits and another does not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gradcodec.distributed.wrappers.worker import Future, Turns
from gradcodec.errors import ConfigError

_MOST = 2
"""Reductions under way, one for each worker. Each keeps its input, an unsharded gradient, alive."""

Reduction = Callable[[dist.ProcessGroup], Tensor]


@dataclass
class _Late:
    """An output that is still to be written, and by what its wrapper may have divided it.

    Without factors it is not divided.
    """

    output: Tensor
    future: Future[Tensor]
    factors: Sequence[float]

    def hold(self) -> None:
        """Mark the output as not written yet."""
        self.output.fill_(1.0 if self.factors else torch.nan)

    def write(self) -> None:
        reduced = self.future.wait()
        if not self.factors:
            # After a pass that failed, somebody may have written into it, as ``zero_grad`` does.
            if bool(self.output.flatten()[0].isnan()):
                self.output.copy_(reduced)
            return
        scaled = self.output.flatten()[:1].clone()
        for factor in self.factors:
            if torch.equal(torch.ones_like(scaled).div_(factor), scaled):
                self.output.copy_(reduced if factor == 1 else reduced.div_(factor))
                return
        raise ConfigError(
            f"FSDP of torch {torch.__version__} scales gradients by {float(scaled):g}, expected "
            f"one over one of {sorted(set(self.factors))}; this version cannot be compressed"
        )


class Behind:
    """The reductions of one group. All its ranks make it together.

    Args:
        group: of the ranks that reduce with each other.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.turns = Turns(group)
        self._late: list[_Late] = []
        self._under_way: deque[Future[Tensor]] = deque()
        self._pass: int | None = None
        self._count = 0
        self._new: set[object] = set()
        self._known: set[object] = set()

    def reduce(
        self,
        key: object,
        output: Tensor,
        work: Reduction,
        *,
        late: bool,
        factors: Sequence[float],
    ) -> None:
        """Write what ``work`` returns into ``output``, now or at the end of the backward pass.

        Args:
            key: of what ranks agree on before they reduce; equal on all ranks. Reductions that
                they may not agree on yet wait in one queue: a failure stops what follows.
            output: of the shape and dtype of what ``work`` returns.
            work: reduces over the ranks of the group that it is given.
            late: whether ``output`` may be written at the end of the pass. If not, all outputs that
                are still to be written are written first.
            factors: by which the wrapper may divide a late output; empty if it does not.

        Raises:
            AgreementError, TrainingError, ConfigError: of this reduction or an earlier one.
        """
        self.turns.check()
        task = torch._C._current_graph_task_id()
        if not late or task < 0 or not output.numel():
            self.finish()
            self._enqueue(key, output, work)
            self.turns.finish()
            output.copy_(self._under_way.pop().wait())
            return
        if self._pass != task:
            # A pass that failed has not called back: what it left is written at the end of this.
            self._pass = task
            torch.autograd.Variable._execution_engine.queue_callback(self.finish)
        while len(self._under_way) >= _MOST:
            self._under_way.popleft().wait()
        late_one = _Late(output, self._enqueue(key, output, work), factors)
        late_one.hold()
        self._late.append(late_one)

    def _enqueue(self, key: object, output: Tensor, work: Reduction) -> Future[Tensor]:
        self._count += 1
        self._new.add(key)
        future = self.turns.enqueue(self._count if key in self._known else 0, work, output)
        self._under_way.append(future)
        return future

    def finish(self) -> None:
        """Write all outputs that are still to be written.

        Raises:
            AgreementError, TrainingError, ConfigError: as ``reduce``.
        """
        late, self._late, self._pass = self._late, [], None
        self._under_way.clear()
        self.turns.finish()
        self._known |= self._new
        for one in late:
            one.write()

    def forget(self) -> None:
        """Ranks will compare again what they reduce."""
        self._known.clear()
        self._new.clear()
