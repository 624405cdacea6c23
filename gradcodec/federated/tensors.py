"""Which tensors of a federation are coded with loss, and which travel bit for bit.

Parameters are coded. Tensors that a lossy codec would ruin are *kept* instead: integers
(BatchNorm's ``num_batches_tracked``) and buffers (its running statistics). Their values travel
whole, in both directions, and only if any of them changed. Server learning rate, momentum and
feedback do not apply to them.

    aggregate of a kept tensor      floating   mean over clients, weighted by examples
                                    integer    maximum (a counter)
                                    bool       whether any is true (the maximum as well)
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradcodec.codec import Codec
from gradcodec.codecs import Identity
from gradcodec.errors import ConfigError, MalformedBodyError
from gradcodec.federated.exact import ExactSum
from gradcodec.parameters import named_buffers, named_parameters, plain_names
from gradcodec.per_tensor import PerTensor
from gradcodec.registry import make_codec
from gradcodec.types import Update, UpdateSpec

BUFFERS = ("*running_mean", "*running_var")
"""Names of BatchNorm's and InstanceNorm's buffers, used if nothing else tells them apart."""

Rules = Sequence[tuple[str, Codec | str]]
"""``(pattern, codec or its name)``; shell patterns over names, the first that matches decides."""


@dataclass(frozen=True)
class Split:
    """The tensors of a state, coded and kept ones apart.

    Attributes:
        names: names of all tensors, in the state's order.
        coded: what goes through codecs.
        kept: what travels bit for bit.
    """

    names: tuple[str, ...]
    coded: dict[str, Tensor]
    kept: dict[str, Tensor]

    @property
    def whole(self) -> dict[str, Tensor]:
        """All tensors, in the state's order."""
        return {n: self.coded[n] if n in self.coded else self.kept[n] for n in self.names}


State = Update | nn.Module | Split
"""Named tensors, the module that holds them, or what ``split`` made of either."""


def tensors_of(state: State) -> Update:
    """A state's tensors; for a module, its trainable parameters and persistent buffers.

    Names are those of the innermost module, whatever wraps it.
    """
    if isinstance(state, Split):
        return state.whole
    if not isinstance(state, nn.Module):
        return state
    return {**named_parameters(state), **named_buffers(state)}


def split(state: State, rules: Rules = ()) -> Split:
    """Separate the tensors that are coded from those that are kept.

    Integers and bools are always kept. Which floating tensors are kept depends on the state:

    - a module: its buffers;
    - named tensors, some of them ``nn.Parameter``: those that are not;
    - named tensors without an ``nn.Parameter`` (a ``state_dict``): those that match ``BUFFERS``.

    A rule for a floating tensor comes first: a lossy codec codes it; ``"fp32"`` leaves a buffer
    kept and sends a parameter's update in fp32.

    Raises:
        ConfigError: a rule gives a lossy codec to an integer or bool tensor.
    """
    if isinstance(state, Split):
        return state
    tensors = plain_names(dict(tensors_of(state)))
    some = any(isinstance(t, nn.Parameter) for t in tensors.values())
    coded: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        codec = rule_for(name, rules)
        exact = codec is None or type(codec) is Identity
        if not tensor.is_floating_point():
            if not exact:
                raise ConfigError(
                    f"{name!r} is {tensor.dtype} and travels bit for bit; the rule that gives it "
                    f"{codec} would lose some of it: leave it out of the rule, or use 'fp32'"
                )
            buffer = True
        elif some or isinstance(state, nn.Module):
            buffer = exact and not isinstance(tensor, nn.Parameter)
        else:
            buffer = exact and any(fnmatch.fnmatchcase(name, p) for p in BUFFERS)
        (kept if buffer else coded)[name] = tensor.detach()
    return Split(tuple(tensors), coded, kept)


def rule_for(name: str, rules: Rules) -> Codec | None:
    """The codec of the first rule that matches a name."""
    for pattern, choice in rules:
        if fnmatch.fnmatchcase(name, pattern):
            return choice if isinstance(choice, Codec) else make_codec(choice)
    return None


def with_rules(codec: Codec, spec: UpdateSpec, rules: Rules) -> Codec:
    """``codec``, except for the tensors that a rule matches: these get the rule's codec.

    Raises:
        ConfigError: a codec has weights for other tensors than it is given.
    """
    groups: dict[bytes, tuple[Codec, list[str]]] = {}
    for t in spec:
        chosen = rule_for(t.name, rules) or codec
        groups.setdefault(chosen.digest, (chosen, []))[1].append(t.name)
    if set(groups) <= {codec.digest}:
        return codec
    return PerTensor.of(spec, groups.values())


def check_rules(rules: Rules, names: Iterable[str]) -> None:
    """Raise ``ConfigError`` for a rule that matches no tensor."""
    known = list(names)
    for pattern, _ in rules:
        if not fnmatch.filter(known, pattern):
            raise ConfigError(
                f"rule {pattern!r} matches no tensor; there are {', '.join(known[:5])}, ..."
            )


def check_private(private: bool, kept: Iterable[str]) -> None:
    """Raise ``ConfigError`` for tensors that would leave a private client bit for bit."""
    names = list(kept)
    if private and names:
        raise ConfigError(
            f"{names[0]!r} travels bit for bit, which privacy does not cover: replace such layers "
            "(GroupNorm has no running statistics), keep these tensors at the client, or give them "
            "a lossy codec by a rule if they are floating"
        )


class KeptMean:
    """The aggregate of kept tensors over the replies of a round; see the table above.

    Args:
        before: the values of the round; a reply without values counts as these.

    Attributes:
        changed: whether any reply had other values.
    """

    def __init__(self, before: Mapping[str, Tensor]) -> None:
        self.before = before
        self.changed = False
        self._sums = {n: ExactSum(t.numel()) for n, t in before.items() if t.is_floating_point()}
        self._most = {n: t for n, t in before.items() if n not in self._sums}
        self._unchanged = 0  # examples of replies without values

    def add(self, values: Mapping[str, Tensor] | None, weight: int) -> None:
        """Add one reply's values; ``None`` if they are those of the round."""
        if values is None:
            self._unchanged += weight
            return
        self.changed = True
        for name, total in self._sums.items():
            # Only what was NaN or Inf before (a mask) may be so (``check_kept``), and stays.
            finite = torch.nan_to_num(values[name].reshape(-1), 0.0, 0.0, 0.0)
            total.add(finite, weight)
        for name, most in self._most.items():
            self._most[name] = torch.maximum(most, values[name])

    def copy(self) -> KeptMean:
        """An independent copy."""
        made = KeptMean(self.before)
        made.changed, made._unchanged = self.changed, self._unchanged
        made._sums = {n: total.copy() for n, total in self._sums.items()}
        made._most = dict(self._most)
        return made

    def result(self) -> dict[str, Tensor]:
        """The next values."""
        out = {}
        for name, t in self.before.items():
            if name in self._sums:
                total = self._sums[name].copy()
                if self._unchanged:
                    total.add(torch.nan_to_num(t.reshape(-1), 0.0, 0.0, 0.0), self._unchanged)
                mean = (total.total() / float(total.weight)).to(t.dtype).view(t.shape)
                out[name] = torch.where(torch.isfinite(t), mean, t)
            else:
                out[name] = self._most[name]
        return out


def check_kept(values: Mapping[str, Tensor], before: Mapping[str, Tensor], who: str) -> None:
    """Raise ``MalformedBodyError`` for NaN or Inf where the values before are finite."""
    for name, t in values.items():
        if t.is_floating_point():
            bad = int((torch.isfinite(before[name]) & ~torch.isfinite(t)).sum())
            if bad:
                raise MalformedBodyError(f"{who}: {bad} values of {name!r} are NaN or Inf")
