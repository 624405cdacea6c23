"""Laws of config.json: what is wrong is named, older schemas are migrated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gradcodec import hub
from gradcodec.codec import Codec
from gradcodec.errors import ConfigError, HubError
from gradcodec.hub import document as schema


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply ``change`` to a folder's config.json."""
    path = folder / "config.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_altered_config_gives_another_digest(saved: Path) -> None:
    edit(saved, lambda d: d["codec"]["inner"].update(bits=8))
    with pytest.raises(HubError, match="digest"):
        Codec.from_pretrained(saved)


def test_altered_spec_gives_another_digest(saved: Path) -> None:
    edit(saved, lambda d: d["spec"].append(["more", [1], "float32"]))
    with pytest.raises(HubError, match="digest"):
        Codec.from_pretrained(saved)


BAD_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown top-level key": (lambda d: d.update(surprise=1), "surprise"),
    "unknown codec key": (lambda d: d["codec"]["outer"].update(surprise=1), "surprise"),
    "missing key": (lambda d: d.pop("weights"), "weights"),
    "newer schema": (lambda d: d.update(schema=hub.SCHEMA + 1), "upgrade"),
    "older schema": (lambda d: d.update(schema=0), "no migration from schema 0"),
    "schema is true": (lambda d: d.update(schema=True), "schema"),
    "another library's config": (lambda d: d.clear(), "gradcodec config"),
    "no kind": (lambda d: d["codec"].pop("kind"), "kind"),
    "unknown kind": (lambda d: d["codec"].update(kind="zip"), "zip"),
    "spec row of two": (lambda d: d["spec"].append(["a", [1]]), "spec rows"),
    "spec not rows": (lambda d: d.update(spec={"a": 1}), "spec"),
    "spec dtype": (lambda d: d["spec"][0].__setitem__(2, "float31"), "float31"),
    "negative size": (lambda d: d["spec"][0].__setitem__(1, [-1]), "spec rows"),
    "tensor twice": (lambda d: d["spec"].append(d["spec"][0]), "twice"),
    "huge tensor": (lambda d: d["spec"].append(["a", [1 << 60], "float32"]), "elements"),
    "digest too short": (lambda d: d.update(digest="00"), "digest"),
    "weight digest not hex": (lambda d: d["weights"].update({"shared.left.bias": "x"}), "SHA-256"),
    "weight in no half": (lambda d: d.update(weights={"mine": "0" * 64}), "'mine'"),
    "notes not text": (lambda d: d.update(notes=[1]), "notes"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_config_is_refused_by_name(saved: Path, case: str) -> None:
    change, words = BAD_CONFIGS[case]
    edit(saved, change)
    with pytest.raises(ConfigError, match=words):
        Codec.from_pretrained(saved)


def test_a_table_of_too_many_rows_is_refused_before_it_is_read() -> None:
    with pytest.raises(ConfigError, match="at most 1048576 tensors"):
        schema.spec_from_rows([["nonsense"]] * ((1 << 20) + 1))


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"schema": NaN}', b'{"schema": 1, "schema": 1}'],
    ids=["empty", "cut", "binary", "deep", "nan", "duplicate"],
)
def test_config_that_is_not_json(saved: Path, text: bytes) -> None:
    (saved / "config.json").write_bytes(text)
    with pytest.raises(HubError, match="expected JSON"):
        Codec.from_pretrained(saved)


@pytest.mark.parametrize("text", [b"[]", b"3", b"null"])
def test_config_that_is_not_an_object(saved: Path, text: bytes) -> None:
    (saved / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match="gradcodec config"):
        Codec.from_pretrained(saved)


def test_older_schemas_go_through_every_migration(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Codec.from_pretrained(saved).digest

    def rename(document: dict[str, Any]) -> dict[str, Any]:
        document["comment"] = document.pop("remark")
        return document

    def drop(document: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in document.items() if k != "comment"}

    edit(saved, lambda d: d.update(remark="old"))
    monkeypatch.setattr(schema, "SCHEMA", 3)
    monkeypatch.setattr(schema, "MIGRATIONS", {1: rename, 2: drop})
    assert Codec.from_pretrained(saved).digest == expected
    monkeypatch.setattr(schema, "MIGRATIONS", {1: rename})
    with pytest.raises(ConfigError, match="no migration from schema 2 to 3"):
        Codec.from_pretrained(saved)
