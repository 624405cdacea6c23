"""All-reduce, reduce-scatter and all-gather of compressed tensors, as plain functions.

They are for pseudogradients (DiLoCo, LocalSGD), for sharded training and for everything that has no
hook. They block; all ranks of the group must call them with equal shapes, codecs and seeds. Each
call first compares these, in one exchange of 48 bytes. If they differ, or a rank refuses its
arguments, all ranks raise the same ``AgreementError``. On CUDA they work on the current stream and
wait for it. With one rank, nothing is exchanged and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gradcodec.codec import Codec
from gradcodec.distributed.checks import FLOATS, check_seed, is_dtensor
from gradcodec.distributed.coding import Route, flat_route, named_codec, routes_of
from gradcodec.distributed.exchange.agreement import LinkChannel, must_agree
from gradcodec.distributed.exchange.lanes import Operand
from gradcodec.distributed.exchange.link import Link, control_link
from gradcodec.distributed.exchange.terms import choice_text, tensor_text
from gradcodec.distributed.exchange.two_shot import gather_shards, mean_of_own_shard, two_shot_mean
from gradcodec.distributed.meter import Traffic
from gradcodec.distributed.residuals import Residuals
from gradcodec.distributed.shards import derive_seed, first_owner
from gradcodec.errors import ConfigError, UpdateError


def compressed_all_reduce(
    tensors: Tensor | Sequence[Tensor],
    codec: Codec | str,
    group: dist.ProcessGroup | None = None,
    *,
    seed: int = 0,
    residuals: Residuals | None = None,
) -> Traffic:
    """Replace every tensor by its mean over the ranks of ``group``, in place.

    It is the mean, not the sum, in two shots (see ``two_shot``): every shard goes to its owner, and
    the owner's mean goes to everyone, so that all ranks end with equal bits. Each tensor is coded
    separately. A learned linear codec (``Subspace``, or a ``Chain`` on one) must be bound to
    exactly these tensors in this order; its codes are averaged instead of the tensors. Shards with
    NaN or Inf travel uncompressed.

    Args:
        tensors: one or several dense floating tensors of any shape.
        codec: a codec, or a name that ``make_codec`` knows such as ``"int4"``.
        group: process group; ``None`` is the default group.
        seed: of stochastic rounding, equal on all ranks; take another one for each call.
        residuals: error feedback, kept by the caller from call to call.

    Returns:
        Bytes and seconds of this rank.

    Raises:
        ConfigError: the codec cannot code these tensors, or the residuals belong to another codec.
        UpdateError: a tensor is sparse or not floating.
        AgreementError: ranks called this with different tensors, codecs or seeds, or one of them
            refused.
        TrainingError: the exchange failed, for example because a rank has died.
        MalformedBodyError: bytes came that no encoder makes.
    """
    return all_reduce(tensors, codec, group, seed=seed, residuals=residuals)


def compressed_reduce_scatter(
    output: Tensor,
    input: Tensor,
    codec: Codec | str,
    group: dist.ProcessGroup | None = None,
    *,
    op: str = "mean",
    seed: int = 0,
    residual: Tensor | None = None,
) -> Traffic:
    """The mean over ranks of this rank's shard of ``input``: the first shot alone.

    Args:
        output: contiguous floating tensor of ``n`` elements; rank ``r`` gets shard ``r`` of
            the mean.
        input: contiguous, ``W n`` elements of the same dtype, rank-major.
        codec: a fixed-rate codec or its name.
        group: process group; ``None`` is the default group.
        op: ``"mean"``, or ``"sum"``: ``W`` times the mean.
        seed: of stochastic rounding, equal on all ranks; take another one for each call.
        residual: error feedback, fp32 ``[scatter_residual_numel(codec, n, W)]``, zeros at first,
            updated in place. It is as large as the unsharded input.

    Raises:
        ConfigError: an unknown ``op``, a codec that needs a tensor table, a wrong residual.
        UpdateError: dtypes or lengths that do not fit.
        AgreementError, TrainingError, MalformedBodyError: as in ``compressed_all_reduce``.
    """
    return reduce_scatter(output, input, codec, group, op=op, seed=seed, residual=residual)


@torch.no_grad()
def compressed_all_gather(
    outputs: Tensor | Sequence[Tensor],
    input: Tensor,
    codec: Codec | str,
    group: dist.ProcessGroup | None = None,
    *,
    seed: int = 0,
) -> Traffic:
    """Gather every rank's ``input`` at every rank: the second shot alone.

    A rank decodes its own bytes as well, so that all ranks hold equal bits.

    Args:
        outputs: one contiguous tensor for all inputs in rank order, or a list of one tensor per
            rank, whose sizes may differ.
        input: floating tensor with as many elements as this rank's tensor or part of ``outputs``.
        codec: a fixed-rate codec or its name.
        group: process group; ``None`` is the default group.
        seed: of stochastic rounding, equal on all ranks; take another one for each call.

    Raises:
        ConfigError: a codec that needs a tensor table.
        UpdateError: dtypes or lengths that do not fit.
        AgreementError, TrainingError, MalformedBodyError: as in ``compressed_all_reduce``.
    """
    control = LinkChannel(control_link(group))
    with must_agree(control, "compressed_all_gather") as terms:
        given = _listed(outputs)
        _check([input, *given], seed)
        coder = flat_route(named_codec(codec)).coder_for(input.dtype)
        link = Link(group, input.device)
        single = isinstance(outputs, Tensor)
        sizes = [input.numel()] * link.size if single else [t.numel() for t in given]
        fits = len(sizes) == link.size and sizes[link.rank] == input.numel()
        if not fits or sum(t.numel() for t in given) != sum(sizes):
            raise UpdateError(
                f"expected outputs for {link.size} ranks with {input.numel()} elements at rank "
                f"{link.rank}, got {[t.numel() for t in given]}"
            )
        if any(t.dtype != input.dtype for t in given):
            raise UpdateError(f"expected outputs of {input.dtype}, got {[t.dtype for t in given]}")
        if single:
            _check_contiguous(given[0])
        terms["codec"] = choice_text(codec)
        terms["elements of each rank"] = ", ".join(map(str, sizes))
        terms["dtype"], terms["seed"] = str(input.dtype), str(seed)
    link.meter.dense = input.numel() * input.element_size()
    out = given[0].view(-1) if single else torch.empty(sum(sizes), dtype=input.dtype)
    out = out.to(input.device)
    flat = input.reshape(-1).contiguous()
    if link.size == 1:
        out.copy_(flat)
    else:
        ends = [sum(sizes[: r + 1]) for r in range(link.size)]
        ranges = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        operand = Operand(out, coder, out, derive_seed(seed))
        gather_shards(operand, ranges, flat, link, context=seed)
    if not single:
        for part, tensor in zip(torch.split(out, sizes), given, strict=True):
            tensor.copy_(part.view(tensor.shape))
    return link.meter.traffic + control.link.meter.traffic


def scatter_residual_numel(codec: Codec | str, numel: int, world: int) -> int:
    """Length of ``compressed_reduce_scatter``'s residual for outputs of ``numel`` elements."""
    return world * flat_route(named_codec(codec)).coder_for(torch.float32).residual_numel(numel)


# -- for callers that may already know that ranks agree ---------------------------------------


@torch.no_grad()
def all_reduce(
    tensors: Tensor | Sequence[Tensor],
    codec: Codec | str,
    group: dist.ProcessGroup | None,
    *,
    seed: int,
    residuals: Residuals | None = None,
    agreed: bool = False,
) -> Traffic:
    """``compressed_all_reduce``; with ``agreed``, ranks compare nothing first."""
    control = None if agreed else LinkChannel(control_link(group))
    with must_agree(control, "compressed_all_reduce") as terms:
        given = _listed(tensors)
        _check(given, seed)
        if residuals is not None and not isinstance(residuals, Residuals):
            raise ConfigError(f"expected Residuals() or None, got {type(residuals).__name__}")
        routes = _routes(codec, given) if given else []
        link = Link(group, given[0].device) if given else control_link(group)
        link.meter.dense = sum(t.numel() * t.element_size() for t in given)
        operands = []
        for i, (tensor, route) in enumerate(zip(given, routes, strict=True)):
            if link.size == 1:
                break
            values = tensor.reshape(-1).contiguous()
            if route.projection is not None:
                values = route.projection.code(values)
            operand = Operand(
                values,
                route.coder_for(values.dtype),
                out=values,
                seed=derive_seed(seed, i),
                first_owner=first_owner(str(i), link.size),
            )
            if residuals is not None:
                operand.first, operand.second = residuals.of(
                    str(i), values, operand.coder, link.rank, link.size
                )
            operands.append(operand)
        if control is not None:
            terms["codec"] = choice_text(codec)
            terms.update({f"tensor {i}": tensor_text(t) for i, t in enumerate(given)})
            terms["seed"], terms["residuals"] = str(seed), _kept(residuals)
    if operands:
        two_shot_mean(operands, link, context=seed)
    for operand, tensor, route in zip(operands, given, routes, strict=bool(operands)):
        mean = operand.out if route.projection is None else route.projection.values(operand.out)
        if mean.data_ptr() != tensor.data_ptr():
            tensor.copy_(mean.view(tensor.shape))
    return link.meter.traffic + _spent(control)


@torch.no_grad()
def reduce_scatter(
    output: Tensor,
    input: Tensor,
    codec: Codec | str,
    group: dist.ProcessGroup | None,
    *,
    op: str,
    seed: int,
    residual: Tensor | None = None,
    agreed: bool = False,
) -> Traffic:
    """``compressed_reduce_scatter``; with ``agreed``, ranks compare nothing first."""
    control = None if agreed else LinkChannel(control_link(group))
    with must_agree(control, "compressed_reduce_scatter") as terms:
        if op not in ("mean", "sum"):
            raise ConfigError(f"expected op of ['mean', 'sum'], got {op!r}")
        _check([output, input], seed)
        coder = flat_route(named_codec(codec)).coder_for(input.dtype)
        link = Link(group, input.device)
        n = output.numel()
        if input.numel() != n * link.size or input.dtype != output.dtype:
            raise UpdateError(
                f"expected an input of {link.size} x {n} elements of {output.dtype}, got "
                f"{input.numel()} of {input.dtype}"
            )
        _check_contiguous(output, input)
        expected = link.size * coder.residual_numel(n)
        if residual is not None and link.size > 1:
            if residual.numel() != expected:
                raise ConfigError(
                    f"expected a residual of {expected} values, got {residual.numel()}"
                )
            if residual.dtype is not torch.float32:
                raise ConfigError(f"expected a residual of float32, got {residual.dtype}")
        if control is not None:
            terms["codec"], terms["output"] = choice_text(codec), tensor_text(output)
            terms["op"], terms["seed"], terms["residual"] = op, str(seed), _kept(residual)
    link.meter.dense = input.numel() * input.element_size()
    if link.size == 1:
        output.copy_(input.view(output.shape))
        return link.meter.traffic
    flat = input.view(-1)
    first = None if residual is None else list(torch.split(residual, coder.residual_numel(n)))
    operand = Operand(flat, coder, flat, derive_seed(seed), first=first)
    ranges = [(r * n, (r + 1) * n) for r in range(link.size)]
    mean = mean_of_own_shard(operand, ranges, link, context=seed)
    if op == "sum":
        mean *= link.size
    output.view(-1).copy_(coder.narrow(mean, output.dtype))
    return link.meter.traffic + _spent(control)


def _kept(residuals: object) -> str:
    return "none" if residuals is None else "kept"


def _spent(control: LinkChannel | None) -> Traffic:
    return Traffic() if control is None else control.link.meter.traffic


def _routes(codec: Codec | str, tensors: list[Tensor]) -> list[Route]:
    """A route per tensor; a learned codec's table gives the names."""
    bound = named_codec(codec)
    shapes = [tuple(t.shape) for t in tensors]
    if bound.spec is None:
        names = [str(i) for i in range(len(shapes))]
    else:
        names = [t.name for t in bound.spec]
        if len(names) != len(shapes):
            raise ConfigError(f"expected the {len(names)} tensors of {bound}, got {len(shapes)}")
    routes = routes_of(bound, dict(zip(names, shapes, strict=True)))
    return [routes[n] for n in names]


def _check(tensors: list[Tensor], seed: object) -> None:
    check_seed(seed)
    for t in tensors:
        if not isinstance(t, Tensor):
            raise UpdateError(f"expected tensors, got {type(t).__name__}")
        if is_dtensor(t):
            raise UpdateError("expected plain tensors, got a DTensor: pass its to_local()")
        if t.layout is not torch.strided or t.dtype not in FLOATS or t.is_meta:
            raise UpdateError(
                "expected dense floating tensors of fp32, fp64, fp16 or bf16, got "
                f"{t.dtype} {t.layout} on {t.device}"
            )
        if any(stride == 0 and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True)):
            raise UpdateError("expected tensors that own their elements, got an expanded one")
    if len({t.device for t in tensors}) > 1:
        raise UpdateError(f"expected one device, got {sorted({str(t.device) for t in tensors})}")


def _listed(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor):
        return [tensors]
    if not isinstance(tensors, Sequence):
        raise UpdateError(f"expected a tensor or a sequence of them, got {type(tensors).__name__}")
    return list(tensors)


def _check_contiguous(*tensors: Tensor) -> None:
    if not all(t.is_contiguous() for t in tensors):
        raise UpdateError("expected contiguous tensors")
