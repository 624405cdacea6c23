"""WIRE.md says what wire.py does."""

import re
from pathlib import Path

import torch

from gradcodec import wire
from gradcodec.codecs import Cast
from gradcodec.encodable import DTYPE_CODES
from gradcodec.errors import WireError
from gradcodec.packers.cast import CastConfig

PAGE = (Path(__file__).parents[1] / "WIRE.md").read_text()


def section(title: str) -> str:
    """Text from a heading up to the next one of any level."""
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert match, f"WIRE.md has no section {title!r}"
    return match.group(1)


def table(title: str) -> dict[str, str]:
    """First column (in backticks) -> second column of a section's table."""
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", section(title), re.MULTILINE)
    assert len(dict(rows)) == len(rows), f"a row of {title!r} comes twice"
    return dict(rows)


def test_codec_ids() -> None:
    assert {name: int(value) for name, value in table("Codecs").items()} == wire.CODEC_IDS


def test_every_codec_has_its_body_described() -> None:
    described = re.findall(r"^### `(\w+)`$", PAGE, re.MULTILINE)
    assert described == list(wire.CODEC_IDS)


def test_dtype_codes() -> None:
    known = {str(dtype).removeprefix("torch."): code for dtype, code in DTYPE_CODES.items()}
    assert {name: int(value) for name, value in table("Dtypes").items()} == known


def test_limits() -> None:
    known = {n: getattr(wire, n) for n in dir(wire) if n.startswith("MAX_")}
    assert {name: int(value) for name, value in table("Limits").items()} == known


def test_errors() -> None:
    def names(cls: type[WireError]) -> set[str]:
        return {c.__name__ for c in cls.__subclasses__()}.union(*map(names, cls.__subclasses__()))

    assert set(table("Errors")) == names(WireError)


def test_version_and_magic() -> None:
    assert PAGE.startswith(f"# The wire format, version {wire.WIRE_VERSION}\n")
    assert f"| magic | {len(wire.MAGIC)} | `{wire.MAGIC.hex(' ')}`" in section("Layout")
    assert f"| version | 1 | `{wire.WIRE_VERSION:02x}` |" in section("Layout")
    assert f"| codec digest | {wire.DIGEST_BYTES} |" in section("Layout")


def test_overhead_of_a_bound_payload() -> None:
    payload = wire.Payload("identity", bytes(8), bytes(100))
    assert "cost 17 bytes and the body length's varint" in " ".join(section("Layout").split())
    assert len(payload.to_bytes()) == 17 + 1 + 100


def test_example() -> None:
    (block,) = re.findall(r"^```hex\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    shown = b"".join(bytes.fromhex(line.split("  ")[0]) for line in block.splitlines())
    codec = Cast(CastConfig("bfloat16"))
    assert codec.encoder.encode({"w": torch.tensor([1.0, -2.0])}).to_bytes() == shown
