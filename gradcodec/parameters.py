"""Parameters by name: the only identity that survives wrapping, rebuilt buckets and restarts.

Whatever wraps a model (DDP, ``torch.compile``, FSDP, activation checkpointing, nested in any order,
also around submodules), a parameter has one name here: the one that it has in the unwrapped model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradcodec.errors import ConfigError

T = TypeVar("T")

NamedParameters = nn.Module | Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]

#: What torch.compile, FSDP1 and activation checkpointing add to names; no model has such a name.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: What DDP adds. A model may have a submodule of this name, so only the wrapper's is removed.
_MODULE = "module"
#: Attributes under which wrappers keep their optimiser; ``unwrap_optimizer`` says whose they are.
_INNER = ("optimizer", "_optimizer", "original_optimizer")


def plain_name(name: str) -> str:
    """A module's or parameter's name without what compiling, sharding, checkpointing add to it.

    DDP's ``module.`` stays: the name alone does not tell it from a submodule.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def plain_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``root.named_modules()`` with plain names; a wrapper has the name of what it wraps."""
    seen: set[int] = set()

    def visit(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield path, module
        parallel = isinstance(module, DistributedDataParallel | DataParallel)
        for name, child in module._modules.items():
            if child is not None:
                wrapped = name in _WRAPPERS or (parallel and name == _MODULE)
                yield from visit(child, path if wrapped else join(path, name))

    return visit(root, "")


def join(path: str, name: str) -> str:
    """The name of a module's own parameter or child."""
    return f"{path}.{name}" if path else name


def plain_names(named: Mapping[str, T], known: Collection[str] = ()) -> dict[str, T]:
    """The mapping with plain names, in its order.

    A ``module.`` before all names, as in ``dict(ddp.named_parameters())``, is removed only if
    ``known`` confirms it: each known name is there without the prefix, and no prefixed name is
    known.

    Raises:
        ConfigError: two names become the same plain name.
    """
    out: dict[str, T] = {}
    for name, value in named.items():
        plain = plain_name(name)
        if plain in out:
            raise ConfigError(f"expected one parameter of each name, {plain!r} came twice")
        out[plain] = value
    before = _MODULE + "."
    if known and all(n.startswith(before) and n not in known for n in out):
        bare = {n.removeprefix(before): value for n, value in out.items()}
        if all(n in bare for n in known):
            return bare
    return out


def all_parameters(source: NamedParameters, known: Collection[str] = ()) -> dict[str, nn.Parameter]:
    """Parameters by plain name, frozen ones included; a shared parameter has its first name.

    Args:
        source: a module, or its parameters by name. In the latter case the names are the caller's,
            apart from what ``plain_names`` removes.
        known: the names in a codec or a saved state, if there is one.

    Raises:
        ConfigError: ``source`` is neither a module nor named parameters, two parameters have the
            same name, or one has no shape yet.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, parameter in plain_names(dict(_pairs(source)), known).items():
        if is_lazy(parameter):
            raise ConfigError(
                f"{name!r} has no shape yet: give the lazy module a batch before handing it over"
            )
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter
    return found


def named_parameters(
    source: NamedParameters, known: Collection[str] = ()
) -> dict[str, nn.Parameter]:
    """``all_parameters`` without the frozen ones.

    Raises:
        ConfigError: no parameter is trainable; also whatever ``all_parameters`` raises.
    """
    found = {n: p for n, p in all_parameters(source, known).items() if p.requires_grad}
    if not found:
        raise ConfigError("expected at least one trainable parameter, got none")
    return found


def named_buffers(module: nn.Module) -> dict[str, Tensor]:
    """A module's persistent buffers, those of its ``state_dict``, by plain name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, part in plain_modules(module):
        for name, buffer in part._buffers.items():
            persistent = name not in part._non_persistent_buffers_set
            if buffer is not None and persistent and id(buffer) not in seen:
                seen.add(id(buffer))
                found[join(path, name)] = buffer
    return found


def _pairs(source: NamedParameters) -> Iterator[tuple[str, nn.Parameter]]:
    if isinstance(source, nn.Module):
        for path, module in plain_modules(source):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield join(path, name), parameter
        return
    wanted = "expected a module, or parameters by name such as model.named_parameters()"
    if not isinstance(source, Iterable):
        raise ConfigError(f"{wanted}, got {type(source).__name__}")
    seen: set[str] = set()
    for pair in source.items() if isinstance(source, Mapping) else source:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise ConfigError(f"{wanted}, got {type(source).__name__} of {type(pair).__name__}")
        name, parameter = pair
        if not isinstance(parameter, Tensor):
            raise ConfigError(f"{wanted}, got a {type(parameter).__name__} as {name!r}")
        if name in seen:
            raise ConfigError(f"expected one parameter of each name, {name!r} came twice")
        seen.add(name)
        yield name, parameter


def sharded_by(parameter: Tensor) -> str | None:
    """What shards this parameter over the ranks, in words, or ``None`` if it is whole."""
    if hasattr(parameter, "full_tensor"):
        return "DTensor (fully_shard, or tensor parallelism)"
    # Set by FSDP1 on its flat parameters and, under use_orig_params, on the original ones.
    if getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False):
        return "FSDP1 (FullyShardedDataParallel)"
    return None


def gradient_of(parameter: Tensor) -> Tensor | None:
    """The parameter's gradient; a sparse one (``nn.Embedding(sparse=True)``) is made dense."""
    gradient = parameter.grad
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def unwrap_optimizer(optimizer: Any) -> Any:
    """The optimiser inside the wrappers of a training framework; anything else is returned as is.

    A wrapper is recognised by the attribute that holds a torch optimiser: ``optimizer``
    (Accelerate, Lightning, DeepSpeed, apex), ``_optimizer``, ``original_optimizer`` (Opacus).
    """
    seen: set[int] = set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        for name in _INNER:
            inner = getattr(optimizer, name, None)
            if isinstance(inner, Optimizer):
                optimizer = inner
                break
    return optimizer
