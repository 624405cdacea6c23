"""Which parameters share one basis, read off their names and shapes."""

from __future__ import annotations

import re
from collections import defaultdict

from gradcodec import layout
from gradcodec.types import UpdateSpec

SHARES = ("none", "kind", "inputs")

#: Modules of one parent that get the same input. No general rule finds them: ``o_proj`` has the
#: parent and the shape of ``q_proj``, but another input.
SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),  # LLaMA, Mistral, Qwen, Gemma, OPT
    ("query", "key", "value"),  # BERT, RoBERTa, ViT
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)

_JOINT = {module: "+".join(modules) for modules in SAME_INPUT for module in modules}
_MODULE = re.compile(rf"(?<![^.])({'|'.join(_JOINT)})(?=\.lora_A(\.|$))")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def group_names(spec: UpdateSpec, share: str) -> dict[str, str]:
    """The name of the group that each parameter shares its basis with.

    - ``"none"``: itself.
    - ``"kind"``: its name with ``*`` in place of the numbers among its dotted parts:
      ``layers.*.self_attn.q_proj.lora_A.weight`` is one basis for all layers.
    - ``"inputs"``: the ``lora_A`` factors of modules with the same input (``SAME_INPUT``):
      ``layers.0.self_attn.q_proj+k_proj+v_proj.lora_A.weight``. All others are on their own.

    Members of a group have the same matrix shape; if a name has several shapes, they are added to
    it, one group each.
    """
    if share == "none":
        return {t.name: t.name for t in spec}
    names = {}
    shapes: dict[str, set[tuple[int, int]]] = defaultdict(set)
    for t in spec:
        if share == "kind":
            names[t.name] = _NUMBER.sub("*", t.name)
        else:
            names[t.name] = _MODULE.sub(lambda found: _JOINT[found[1]], t.name)
        shapes[names[t.name]].add(layout.matrix_shape(t))
    for t in spec:
        if len(shapes[names[t.name]]) > 1:
            rows, cols = layout.matrix_shape(t)
            names[t.name] += f" {rows}x{cols}"
    return names


def groups(spec: UpdateSpec, share: str) -> dict[str, list[str]]:
    """Members of each group that have elements, in spec order."""
    names = group_names(spec, share)
    out: dict[str, list[str]] = defaultdict(list)
    for t in spec:
        if t.numel:
            out[names[t.name]].append(t.name)
    return dict(out)
