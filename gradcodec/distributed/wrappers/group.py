"""A process group whose all-reduce is compressed.

It is for wrappers in which torch calls ``dist.all_reduce`` with no hook in between:
``replicate()``, the replica dimension of HSDP, and DDP without a hook.
"""

# Torch's stubs describe the constructor, `name` and `allreduce` of the C++ class.
# mypy: disable-error-code="call-arg,method-assign,assignment,return-value,override,call-overload"

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Work

from gradcodec.codec import Codec
from gradcodec.distributed.checks import check_count, check_seed, check_state
from gradcodec.distributed.coding import flat_route, named_codec
from gradcodec.distributed.compression import Closing, State, closed_error
from gradcodec.distributed.exchange.agreement import Agreed, StoreChannel, must_agree
from gradcodec.distributed.exchange.collectives import all_reduce
from gradcodec.distributed.exchange.link import control_link
from gradcodec.distributed.exchange.terms import choice_text
from gradcodec.distributed.meter import Counters, Traffic, ring_nbytes
from gradcodec.distributed.shards import derive_seed
from gradcodec.errors import ConfigError

_COMPRESSED = (torch.float32, torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class _Settings:
    codec: Codec
    min_numel: int
    seed: int

    def same(self, other: _Settings) -> bool:
        mine, theirs = self.codec.digest, other.codec.digest
        return mine == theirs and (self.min_numel, self.seed) == (other.min_numel, other.seed)


_registered: dict[str, _Settings] = {}


def register_compressed_backend(
    name: str, codec: Codec | str, *, min_numel: int = 4096, seed: int = 0
) -> None:
    """Register a gloo backend for CPU tensors whose all-reduce is compressed.

    ``dist.new_group(backend=name)``, ``init_device_mesh(..., backend_override={...: name})``
    and ``DistributedDataParallel(process_group=...)`` can then use it. Sums and averages of one
    dense tensor of at least ``min_numel`` fp32, bf16 or fp16 elements go through ``codec``;
    everything else goes to gloo unchanged. All ranks end with equal bits.

    **Lossy for everyone who uses the group**: reduce only gradients over it, no metrics or other
    large floating tensors. Tensors come without names, so there is no error feedback: use an
    unbiased codec, ``"int4-unbiased"`` or ``"int8-unbiased"``.

    Args:
        name: the backend's name, a lower-case identifier that no other backend has.
        codec: a fixed-rate codec or its name.
        min_numel: all-reduces of fewer elements are not compressed.
        seed: of stochastic rounding; equal on all ranks.

    Raises:
        ConfigError: the name is taken (also by this function with other settings), the codec needs
            a tensor table, or ``min_numel`` is negative.
    """
    if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
        raise ConfigError(f"expected a lower-case identifier as a backend's name, got {name!r}")
    check_count("min_numel", min_numel)
    check_seed(seed)
    settings = _Settings(named_codec(codec), min_numel, seed)
    flat_route(settings.codec)  # raises for codecs that cannot code bare vectors
    before = _registered.get(name)
    if before is not None and before.same(settings):
        return
    if before is not None or name in dist.Backend.backend_list:
        raise ConfigError(f"there is a backend named {name!r} already; choose another name")
    dist.Backend.register_backend(
        name,
        lambda options, _: CompressedGroup(options, name, settings),
        extended_api=True,
        devices=["cpu"],
    )
    _registered[name] = settings


class CompressedGroup(Closing, dist.ProcessGroup):
    """Gloo with one method replaced; torch makes it from a backend's name. It is a ``Compression``.

    The same gloo backend carries the compressed bytes. They cannot be mixed up with other messages,
    since all ranks issue a group's collectives in equal order. A compressed all-reduce is done when
    the call returns, also with ``async_op=True``.

    Raises:
        AgreementError: ranks registered the backend with different settings.
    """

    over_gloo = True

    def __init__(self, options: Any, name: str, settings: _Settings) -> None:
        super().__init__(options.group_rank, options.group_size)
        self.name, self.settings = name, settings
        self.counters = Counters()
        self._steps = 0
        self._agreed = Agreed()
        here = (options.group_rank, options.group_size)
        channel = StoreChannel(options.store, *here, options.timeout)
        with must_agree(channel, f"register_compressed_backend({name!r})") as mine:
            mine["codec"] = choice_text(settings.codec)
            mine["min_numel"], mine["seed"] = str(settings.min_numel), str(settings.seed)
        gloo = dist.ProcessGroupGloo(
            options.store, options.group_rank, options.group_size, options.timeout
        )
        gloo._set_sequence_number_for_group()
        self._plain = dist.ProcessGroup(options.store, options.group_rank, options.group_size)
        for group in (self, self._plain):
            group._register_backend(_CPU, dist.ProcessGroup.BackendType.GLOO, gloo)

    def getBackendName(self) -> str:
        """The registered name."""
        return self.name

    def allreduce(self, tensors: Sequence[Tensor], options: Any = None) -> Any:
        """Sum or average in place.

        Returns:
            The work; if the tensor was compressed, it is done already.

        Raises:
            ConfigError: PREMUL_SUM of a large tensor: gloo lacks it and its factor cannot be read.
            AgreementError: ranks came with different tensors or step counts.
        """
        options = dist.AllreduceOptions() if options is None else options
        if not self._compresses(tensors):
            return self._plain.allreduce(tensors, options)
        op, tensor = options.reduceOp, tensors[0]
        if op == dist.ReduceOp.PREMUL_SUM:
            raise ConfigError(
                f"{self.name}: PREMUL_SUM has a factor that cannot be read; with FSDP2 call "
                "set_force_sum_reduction_for_comms(True)"
            )
        # Not `in`: that calls `==` of the enum member, which equals no ReduceOp object.
        summed = op == dist.ReduceOp.SUM
        if not summed and op != dist.ReduceOp.AVG:
            return self._plain.allreduce(tensors, options)
        if self.closed:
            raise closed_error()
        # Detached, so that autograd does not record the changes in place.
        values = tensor.detach()
        self._agree(values, "sum" if summed else "mean")
        traffic = all_reduce(
            values,
            self.settings.codec,
            self,
            seed=derive_seed(self.settings.seed, self._steps),
            agreed=True,
        )
        self.counters.add(traffic)
        self._steps += 1
        if summed:
            values.mul_(self.size())
        return _Done(tensors)

    def _agree(self, values: Tensor, op: str) -> None:
        """Compare ranks before an all-reduce of a new length or kind."""
        key = (values.numel(), values.dtype, op)
        if key in self._agreed:
            return
        link = control_link(self)
        self._agreed.ensure(
            key,
            link,
            f"all_reduce over {self.name!r}",
            lambda: {
                "tensor": f"{values.dtype} of {values.numel()} elements",
                "op": op,
                "step": str(self._steps),
            },
        )
        self.counters.add(link.meter.traffic)

    def _compresses(self, tensors: Sequence[Tensor]) -> bool:
        if len(tensors) != 1 or self.size() == 1:
            return False
        (t,) = tensors
        dense = t.layout is torch.strided and t.dtype in _COMPRESSED
        return dense and t.numel() >= max(self.settings.min_numel, 1)

    @property
    def step(self) -> int:
        """Compressed all-reduces so far."""
        return self._steps

    @property
    def traffic(self) -> Traffic:
        """Bytes and seconds of compressed all-reduces so far, of this rank."""
        return self.counters.traffic

    def stats(self) -> dict[str, Any]:
        """Counters by the keys of ``Compression.stats``; the only name is that of the backend."""
        return self.counters.stats(
            steps=self._steps,
            dense_wire=ring_nbytes(self.traffic.dense, self.size()),
            codecs={self.getBackendName(): choice_text(self.settings.codec)},
        )

    def state_dict(self) -> State:
        """Number of reductions so far, which seeds the dither. There are no residuals."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Tensor | int], *, strict: bool = True) -> None:
        """Inverse of ``state_dict``, on all ranks. ``strict`` changes nothing: no names are kept.

        Raises:
            ConfigError: ``state`` has no number of steps.
        """
        check_state(state, "steps")
        check_count("steps", int(state["steps"]))
        self._agreed.clear()  # the terms may have changed
        self._steps = int(state["steps"])


def _passed_on(name: str) -> Callable[..., Any]:
    def method(self: CompressedGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._plain, name)(*args, **kwargs)

    method.__name__ = name
    method.__doc__ = f"As gloo's ``{name}``."
    return method


# Methods that torch calls through Python in a Python group. Those of the base class would run with
# the GIL held. Gloo's threads need the GIL while they hold a lock of gloo, so that sometimes both
# wait forever.
for _name in (
    "all_gather_single_coalesced",
    "all_to_all_single",
    "allgather",
    "allgather_into_tensor_coalesced",
    "allreduce_coalesced",
    "alltoall_base",
    "barrier",
    "broadcast",
    "recv",
    "reduce_scatter",
    "reduce_scatter_single_coalesced",
    "reduce_scatter_tensor_coalesced",
    "send",
):
    if hasattr(dist.ProcessGroup, _name):  # some are the old, some the new names of one thing
        setattr(CompressedGroup, _name, _passed_on(_name))


class _Done(Work):
    """Work that has been done."""

    def __init__(self, result: Sequence[Tensor]) -> None:
        super().__init__()
        self._future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        self._future.set_result(list(result))

    def wait(self, timeout: timedelta | None = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def get_future(self) -> Any:
        return self._future
