"""README.md of a codec folder: what the codec is, its sizes, its digest, how to load it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from gradcodec.hub.folder import Folder

_CARD: Final = """---
library_name: gradcodec
tags: [gradcodec, gradient-compression, federated-learning]
---

# {title}

A `gradcodec` codec: it encodes model updates (gradients,
parameter differences) into few bytes and decodes them.

| | |
|---|---|
{table}

What it was fitted on: {notes}

```python
from gradcodec import Codec

codec = Codec.from_pretrained("{where}")
payload = codec.encoder.encode(update)
update = codec.decoder.decode(payload)
```
"""


def make_card(folder: Folder, name: str | None = None) -> str:
    """Text of ``README.md``: what the codec is, its sizes, its digest, how to load it."""
    stages = " > ".join(_stages(folder.config))
    nbytes = sum(t.numel() * t.element_size() for t in folder.weights.values())
    ratio, bits = _setting(folder.config, "ratio"), _setting(folder.config, "bits")
    facts = {"kind": stages, "weights": f"{nbytes} bytes in {len(folder.weights)} tensors"}
    if ratio:
        facts["ratio"] = f"{ratio:g} update elements per code value"
    if folder.spec is None:
        facts["update"] = "any: the codec is not bound to a tensor table"
    else:
        facts["update"] = f"{folder.spec.numel} elements in {len(folder.spec)} tensors"
        if ratio:
            values = math.ceil(folder.spec.numel / ratio)
            size = f", {math.ceil(values * bits / 8)} bytes at {bits:g} bits" if bits else ""
            facts["code"] = f"about {values} values{size}"
    facts["digest"] = f"`{folder.digest.hex()}`, in every payload"
    return _CARD.format(
        title=name or f"{stages} codec",
        table="\n".join(f"| {k} | {v} |" for k, v in facts.items()),
        notes=folder.notes or "not stated",
        where=name or "this folder or its Hub repository id",
    )


def _stages(config: Mapping[str, Any]) -> list[str]:
    """Kinds of a codec's innermost parts, in order of encoding."""
    inside = [s for v in config.values() if isinstance(v, dict) and "kind" in v for s in _stages(v)]
    return inside or [str(config["kind"])]


def _setting(config: Mapping[str, Any], key: str) -> float | None:
    """The first number called ``key`` in the config or in a config nested in it."""
    if isinstance(config.get(key), int | float):
        return float(config[key])
    nested = (_setting(v, key) for v in config.values() if isinstance(v, dict))
    return next((v for v in nested if v is not None), None)
