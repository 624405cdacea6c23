"""Parameters by name: the only identity that survives rebuilt buckets and restarts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gradcodec.errors import ConfigError

NamedParameters = nn.Module | Mapping[str, nn.Parameter] | Iterable[tuple[str, nn.Parameter]]

_WRAPPER = "_orig_mod."  # what torch.compile puts into names


def named_parameters(source: NamedParameters) -> dict[str, nn.Parameter]:
    """Trainable parameters by their name in the innermost model.

    The prefixes of ``DistributedDataParallel`` and ``torch.compile`` are left out, so that names
    are the same before and after wrapping. A shared parameter has its first name.

    Raises:
        ConfigError: two parameters have one name, or there is none.
    """
    if isinstance(source, nn.Module):
        inner = source
        while True:
            if isinstance(inner, DistributedDataParallel):
                inner = inner.module
            elif isinstance(compiled := getattr(inner, "_orig_mod", None), nn.Module):
                inner = compiled
            else:
                break
        pairs: Iterable[tuple[str, nn.Parameter]] = inner.named_parameters()
    else:
        pairs = source.items() if isinstance(source, Mapping) else source
    found: dict[str, nn.Parameter] = {}
    for name, parameter in pairs:
        plain = name.replace(_WRAPPER, "")
        if plain in found:
            raise ConfigError(f"expected one parameter of each name, {plain!r} came twice")
        if parameter.requires_grad:
            found[plain] = parameter
    if not found:
        raise ConfigError("expected at least one trainable parameter, got none")
    return found
