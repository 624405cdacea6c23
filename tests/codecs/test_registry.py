"""Names, kinds and wire ids."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gradcodec import wire
from gradcodec.codec import Codec, codec_class
from gradcodec.errors import ConfigError, GradcodecError, HubError
from gradcodec.hub import bundled
from gradcodec.registry import UNTRAINED, find_codec, make_codec
from gradcodec.wire import CODEC_IDS

EXPECTED = {
    "fp32": ("identity", 32),
    "fp16": ("cast", 16),
    "bf16": ("cast", 16),
    "int8": ("blockquant", 8),
    "int4": ("blockquant", 4),
    "int2": ("blockquant", 2),
    "sign": ("blockquant", 1),
    "topk": ("topk", None),
    "rotsign": ("rotsign", None),
    "rotsign-quarter": ("rotsign", 0.25),
    "rotsign-eighth": ("rotsign", 0.125),
    "int8-rotated": ("blockquant", 8),
    "int4-rotated": ("blockquant", 4),
    "int2-rotated": ("blockquant", 2),
    "sign-rotated": ("blockquant", 1),
    "gauss4": ("blockquant", 4),
    "gauss4-64": ("blockquant", 4.25),
    "int8-unbiased": ("blockquant", 8),
    "int4-unbiased": ("blockquant", 4),
    "int2-unbiased": ("blockquant", 2),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_names_make_the_codec_they_say(name: str) -> None:
    codec = make_codec(name)
    kind, bits = EXPECTED[name]
    assert codec.config.kind == kind
    # 2^16 values hide a block's scales: 16 bits for 256 values at 8, 4 and 1 bit, 32 at 2 bits.
    if bits is not None:
        assert bits <= 8 * codec.packer.nbytes(1 << 16) / (1 << 16) <= bits + 1 / 8


def test_every_name_is_expected() -> None:
    assert set(EXPECTED) == set(UNTRAINED)


@pytest.mark.parametrize("name", ["", "int3", "INT4", "subspace", "identity", "a" * 10_000])
def test_an_unknown_name_is_one_line_that_says_where_the_names_are(name: str) -> None:
    with pytest.raises(ConfigError, match="`gradcodec info` lists all") as caught:
        make_codec(name)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("find", [make_codec, find_codec])
def test_a_slip_of_the_pen_gets_a_suggestion(find: Callable[[str], Codec]) -> None:
    with pytest.raises(GradcodecError, match="did you mean 'int4-rotated'"):
        find("int4_rotated")


def test_a_codec_that_cannot_be_found_may_be_meant_as_an_untrained_or_a_bundled_one() -> None:
    for name in ("int-4", bundled()[0].upper()):
        with pytest.raises(HubError, match=f"did you mean '{name.lower().replace('t-', 't')}'"):
            find_codec(name)


def test_a_folder_does_not_take_the_name_of_an_untrained_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does not take that of a bundled one: a name means the same wherever one works."""
    monkeypatch.chdir(tmp_path)
    make_codec("int8").save_pretrained("int4")
    assert find_codec("int4").digest == make_codec("int4").digest
    assert find_codec("./int4").digest == make_codec("int8").digest


def test_codecs_are_made_anew() -> None:
    assert make_codec("int4") is not make_codec("int4")


def test_wire_ids_are_one_to_one() -> None:
    assert len(set(CODEC_IDS.values())) == len(CODEC_IDS)


def test_wire_ids_fit_a_byte_and_leave_zero_out() -> None:
    assert set(CODEC_IDS.values()) <= set(range(1, 256))


@pytest.mark.parametrize("kind", CODEC_IDS)
def test_every_wire_id_has_a_class_of_its_kind(kind: str) -> None:
    cls = codec_class(kind)
    assert issubclass(cls, Codec)
    assert cls.Config.kind == kind


def test_classes_are_one_to_one() -> None:
    assert len({codec_class(kind) for kind in CODEC_IDS}) == len(wire.CODEC_IDS)


def test_an_unknown_kind_lists_the_kinds() -> None:
    with pytest.raises(ConfigError) as caught:
        codec_class("zip")
    assert all(repr(kind) in str(caught.value) for kind in CODEC_IDS)


@pytest.mark.parametrize("name", UNTRAINED)
def test_a_config_survives_json_values(name: str) -> None:
    codec = make_codec(name)
    again = codec_class(codec.config.kind).from_config(codec.config.to_dict())
    assert again.digest == codec.digest


@pytest.mark.parametrize("name", UNTRAINED)
def test_an_unknown_setting_is_an_error_that_names_it(name: str) -> None:
    codec = make_codec(name)
    with pytest.raises(ConfigError, match="speed"):
        type(codec).Config.from_dict({**codec.config.to_dict(), "speed": 1})
