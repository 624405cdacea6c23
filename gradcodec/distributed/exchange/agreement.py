"""The handshake: ranks compare what they must have in common, before anything depends on it.

The size of a message follows from the settings, so a message cannot say that settings differ: gloo
aborts a process to which more bytes come than it expects, and NCCL hangs. So ranks compare settings
first, as *terms*: short texts by name.

    1. everyone sends everyone a record of 48 bytes: magic, refusal, length and SHA-256 of its terms
    2. if records differ, the first rank with each distinct record sends its terms to everyone
    3. every rank makes the same error message of the same texts, and raises it

A rank that refuses its arguments sends its refusal in place of terms; no other rank waits for it.
Nothing that comes from a rank is interpreted or run: its text is lines of at most ``MAX_TEXT``
bytes in all. The layout of a record never changes. Only ``PROTOCOL``, one of the terms, may.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch

from gradcodec._version import __version__
from gradcodec.distributed.exchange.link import Link
from gradcodec.errors import AgreementError, TrainingError

Terms = dict[str, str]

PROTOCOL = 2
"""Number of the protocol by which ranks exchange gradients; number 1 had no handshake."""

MAX_TEXT = 1 << 24
"""Most bytes of a rank's terms that are sent; a model of 100,000 parameters needs fewer."""

_MAX_SPEAKERS = 8
_MAX_DIFFERENCES = 4
_MAX_SHOWN = 120

_MAGIC = b"gcagree"
_RECORD = struct.Struct("<7s?Q32s")

_CALL, _REFUSED = "call", "refused"


class Channel(Protocol):
    """The ranks that compare, and a way to gather a few bytes from each."""

    rank: int
    size: int

    def gather(self, mine: bytes, sizes: Sequence[int]) -> list[bytes]:
        """Return what every rank gave: ``sizes[r]`` bytes of rank ``r``."""
        ...


class LinkChannel:
    """A channel over a link."""

    def __init__(self, link: Link) -> None:
        self.link, self.rank, self.size = link, link.rank, link.size

    def gather(self, mine: bytes, sizes: Sequence[int]) -> list[bytes]:
        """Swap once, sending the same bytes to everyone."""
        sent = torch.frombuffer(bytearray(mine or b"\0"), dtype=torch.uint8)[: len(mine)]
        came = self.link.swap([[sent]] * self.size, list(sizes))
        return [part.cpu().numpy().tobytes() for part in came]


class StoreChannel:
    """A channel over the store that a group is made from, for use before the group exists."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self._round = 0

    def gather(self, mine: bytes, sizes: Sequence[int]) -> list[bytes]:
        """Set this rank's key and read those of the others."""
        self._round += 1
        keys = [f"gradcodec/{self._round}/{r}" for r in range(self.size)]
        try:
            # Hexadecimal, since not every store takes arbitrary bytes.
            self.store.set(keys[self.rank], mine.hex())
            self.store.wait(keys, self.timeout)
            came = [bytes.fromhex(self.store.get(key).decode()) for key in keys]
        except (RuntimeError, ValueError) as err:
            raise TrainingError(
                f"rank {self.rank} of {self.size}: ranks could not compare their settings; another "
                f"rank has died or did not come within the group's timeout ({err})"
            ) from err
        return [part[:size] for part, size in zip(came, sizes, strict=True)]


class Agreed(set[object]):
    """Keys of what ranks have agreed on, so that they compare each thing once."""

    def ensure(
        self, key: object, link: Link, what: str, terms: Callable[[], Mapping[str, str]]
    ) -> None:
        """Agree on ``terms()`` over the link, unless that was done for this key.

        Ranks that agree call this with equal keys, and so remember the same ones.
        """
        if key not in self:
            with must_agree(LinkChannel(link), what) as mine:
                mine.update(terms())
            self.add(key)


@contextmanager
def must_agree(channel: Channel | None, what: str) -> Iterator[Terms]:
    """Compare this rank's terms, which the block fills, with all others' at the end of the block.

    An exception in the block is told to the other ranks. If all ranks raise one, each gets its own;
    if only some do, all get the same ``AgreementError``.

    Args:
        channel: to all ranks; with ``None`` nothing is compared.
        what: what the ranks are about to do, for the message.

    Raises:
        AgreementError: terms differ; the text is the same at every rank.
        TrainingError: a rank is gone.
    """
    version = f"version {__version__}, exchange protocol {PROTOCOL}"
    terms: Terms = {_CALL: what, "gradcodec": version}
    try:
        yield terms
    except TrainingError:
        raise  # another exchange has failed: the other ranks are not here to compare
    except Exception as err:
        refusal = {_CALL: what, _REFUSED: f"{type(err).__name__}: {err}"}
        if text := _disagreement(channel, refusal):
            raise AgreementError(text) from err
        raise
    if text := _disagreement(channel, terms):
        raise AgreementError(text)


def _disagreement(channel: Channel | None, terms: Mapping[str, str]) -> str | None:
    """What differs, in the same words at every rank; ``None`` if nothing, or if all refuse."""
    if channel is None or channel.size == 1:
        return None
    text = _written(terms)
    digest = hashlib.sha256(text).digest()
    text = text[:MAX_TEXT]
    mine = _RECORD.pack(_MAGIC, _REFUSED in terms, len(text), digest)
    records = channel.gather(mine, [len(mine)] * channel.size)
    if len(set(records)) == 1:
        return None
    lengths = {}
    for rank, record in enumerate(records):
        magic, refused, length, _ = _RECORD.unpack(record.ljust(_RECORD.size, b"\0"))
        if magic != _MAGIC or length > MAX_TEXT:
            return (
                f"rank {rank} sent something else than its settings: give every rank the same "
                "version of gradcodec, and let all of them make the same calls in one order"
            )
        lengths[rank] = 0 if refused is None else length
    if all(_RECORD.unpack(record)[1] for record in records):
        return None
    kinds: dict[bytes, list[int]] = {}
    for rank, record in enumerate(records):
        kinds.setdefault(record, []).append(rank)
    speakers = {ranks[0]: ranks for ranks in list(kinds.values())[:_MAX_SPEAKERS]}
    sizes = [lengths[r] if r in speakers else 0 for r in range(channel.size)]
    texts = channel.gather(text if channel.rank in speakers else b"", sizes)
    told = [(_named(ranks), _read(texts[first])) for first, ranks in speakers.items()]
    more = len(kinds) - len(speakers)
    return _message(told, f"; and {more} more kinds of ranks" if more else "")


def _message(told: Sequence[tuple[str, Terms]], end: str) -> str:
    what = told[0][1].get(_CALL, "ranks")
    refusals = [f"{who} refused: {terms[_REFUSED]}" for who, terms in told if _REFUSED in terms]
    if refusals:
        return f"{what}: not every rank can do it; " + "; ".join(refusals) + end
    keys = list(dict.fromkeys(key for _, terms in told for key in terms))
    differ = [key for key in keys if len({terms.get(key) for _, terms in told}) > 1]
    if not differ:
        return f"{what}: ranks differ beyond the first {MAX_TEXT} bytes of their settings{end}"
    lines = []
    for key in differ[:_MAX_DIFFERENCES]:
        values = _shown([terms.get(key, "nothing") for _, terms in told])
        by_rank = [f"{value} on {who}" for (who, _), value in zip(told, values, strict=True)]
        lines.append(f"{key}: " + ", ".join(by_rank))
    if len(differ) > _MAX_DIFFERENCES:
        lines.append(f"and {len(differ) - _MAX_DIFFERENCES} more differences")
    return f"{what}: ranks differ in what must be equal on all of them; " + "; ".join(lines) + end


def _shown(values: Sequence[str]) -> list[str]:
    """Values in quotes; long ones are cut to the text around the first difference."""
    if max(map(len, values)) <= _MAX_SHOWN:
        return [repr(value) for value in values]
    same = 0
    while all(same < len(v) and v[same] == values[0][same] for v in values):
        same += 1
    start = max(0, same - _MAX_SHOWN // 4)
    cut = [value[start : start + _MAX_SHOWN] for value in values]
    return [
        repr(("..." if start else "") + part + ("..." if start + len(part) < len(value) else ""))
        for part, value in zip(cut, values, strict=True)
    ]


def _named(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0 and 2``, ``ranks 0, 1, 2, 3 and 12 more``."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    first, rest = [str(r) for r in ranks[:4]], len(ranks) - 4
    last = f"{rest} more" if rest > 0 else first.pop()
    return f"ranks {', '.join(first)} and {last}"


def _written(terms: Mapping[str, str]) -> bytes:
    """A line for each term, ``key TAB value``; tabs and line ends in either are escaped."""
    lines = [f"{_escaped(key)}\t{_escaped(value)}\n" for key, value in terms.items()]
    return "".join(lines).encode("ascii")


def _escaped(text: str) -> str:
    return text.encode("unicode_escape").decode("ascii")


def _read(text: bytes) -> Terms:
    """Inverse of ``_written`` up to escapes; accepts any bytes, also malformed ones."""
    pairs = (line.partition("\t") for line in text.decode("ascii", "replace").split("\n") if line)
    return {key: value for key, _, value in pairs}
