"""Laws of settings: presets are valid, every option reaches its field, bad values are named."""

import argparse
import dataclasses
import json
import re
from typing import Any

import pytest

from gradcodec.errors import ConfigError
from gradcodec.recipes import schemes
from gradcodec.recipes.command import add_arguments, add_tgap_arguments, settings_of
from gradcodec.recipes.settings import PRESETS, Settings
from gradcodec.recipes.task import LocalTraining

#: A value for every field that differs from the default.
OTHER: dict[str, Any] = {
    "model": "user/model",
    "revision": "v1",
    "dataset": "rows.jsonl",
    "limit": 77,
    "lora_r": 3,
    "lora_alpha": 5.5,
    "targets": ("up_proj", "down_proj"),
    "dtype": "bfloat16",
    "device": "cpu",
    "gradient_checkpointing": True,
    "max_length": 33,
    "clients": 9,
    "fraction": 0.5,
    "rounds": 11,
    "dirichlet": 0.9,
    "min_client": 2,
    "d1": 0.4,
    "held_out": 21,
    "questions": 13,
    "tgap_rounds": 7,
    "tgap_reading": "local",
    "tgap_records": "state",
    "representation": "balanced",
    "aggregation": "sum",
    "server_lr": 0.7,
    "server_momentum": 0.2,
    "ae_steps": 5,
    "seed": 42,
}
OTHER_LOCAL: dict[str, Any] = {
    "lr": 0.25,
    "batch": 6,
    "micro_batch": 3,
    "steps": 99,
    "epochs": 4,
    "clip": 0.125,
    "weight_decay": 0.5,
}


def parsed(*arguments: str, tgap: bool = False) -> Settings:
    parser = argparse.ArgumentParser()
    (add_tgap_arguments if tgap else add_arguments)(parser)
    return settings_of(parser.parse_args(arguments))


def as_arguments(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is True:
        return [flag]
    return [flag, ",".join(value) if isinstance(value, tuple) else str(value)]


def test_every_field_is_tried() -> None:
    fields = {f.name for f in dataclasses.fields(Settings)}
    assert set(OTHER) == fields - {"local", "schemes", "codecs"}
    assert set(OTHER_LOCAL) == {f.name for f in dataclasses.fields(LocalTraining)}


#: What ``gradcodec tgap``, which compares no schemes, does not read.
NOT_OF_TGAP = {"rounds", "questions", "aggregation", "server_lr", "server_momentum"}


@pytest.mark.parametrize(
    ("name", "tgap"), [(n, t) for n in OTHER for t in (False, True) if not (t and n in NOT_OF_TGAP)]
)
def test_every_option_reaches_its_field_and_no_other(name: str, tgap: bool) -> None:
    head = ["--out", "x"] if tgap else []
    settings = parsed(*head, *as_arguments(name, OTHER[name]), tgap=tgap)
    assert settings == dataclasses.replace(Settings(), **{name: OTHER[name]})
    assert settings != Settings()


@pytest.mark.parametrize("name", OTHER_LOCAL)
def test_every_local_option_reaches_its_field_and_no_other(name: str) -> None:
    settings = parsed(*as_arguments(name, OTHER_LOCAL[name]))
    local = dataclasses.replace(Settings().local, **{name: OTHER_LOCAL[name]})
    assert settings == dataclasses.replace(Settings(), local=local)
    assert settings != Settings()


def test_codecs_are_separated_by_commas() -> None:
    assert parsed("--codecs", "rotsign, user/mine,").codecs == ("rotsign", "user/mine")


def test_switches_can_be_switched_off() -> None:
    assert parsed("--preset", "dolly").gradient_checkpointing
    assert not parsed("--preset", "dolly", "--no-gradient-checkpointing").gradient_checkpointing


@pytest.mark.parametrize("name", PRESETS)
def test_presets_construct_and_can_be_changed(name: str) -> None:
    assert parsed("--preset", name) == PRESETS[name]
    changed = parsed("--preset", name, "--rounds", "2", "--lr", "0.5")
    assert changed.rounds == 2
    assert changed.local == dataclasses.replace(PRESETS[name].local, lr=0.5)
    assert changed.model == PRESETS[name].model


def test_the_papers_presets_are_the_papers() -> None:
    rows = {
        n: (p.clients, p.per_round, p.rounds, p.local.batch, p.lora_r, p.dirichlet, p.d1)
        for n, p in PRESETS.items()
        if n != "quick" and not n.startswith("smollm2")
    }
    assert rows == {
        "dolly": (100, 5, 20, 32, 8, 0.5, 0.3),
        "ceval": (3, 3, 5, 24, 16, 0.5, 0.3),
        "mmlu": (3, 3, 8, 8, 8, 0.5, 0.3),
    }


def test_full_compares_everything_and_options_still_win() -> None:
    full = parsed("--full")
    assert (full.schemes, full.rounds) == (schemes.FULL, 20)
    assert parsed("--full", "--rounds", "2", "--schemes", "topk").schemes == ("topk",)


def test_settings_are_plain_json() -> None:
    row = Settings().to_dict()
    again = json.loads(json.dumps(row))
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in again.items()} == row


@pytest.mark.parametrize(
    ("clients", "fraction", "wanted"), [(100, 0.05, 5), (40, 0.125, 5), (3, 1.0, 3), (4, 0.1, 1)]
)
def test_some_clients_take_part_in_each_round(clients: int, fraction: float, wanted: int) -> None:
    assert Settings(clients=clients, fraction=fraction).per_round == wanted


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tgap_records": "weights"}, "'weights'"),
        ({"tgap_records": "signal", "tgap_reading": "local"}, "'signal'"),
        ({"representation": "gradient"}, "'gradient'"),
        ({"tgap_reading": "global"}, "'global'"),
        ({"dtype": "int8"}, "'int8'"),
        ({"fraction": 0.0}, "fraction"),
        ({"fraction": 1.5}, "1.5"),
        ({"fraction": float("nan")}, "nan"),
        ({"schemes": ("fp32", "zip")}, "'zip'"),
        ({"rounds": 0}, "rounds"),
        ({"clients": 0}, "clients"),
        ({"tgap_rounds": 0}, "tgap_rounds"),
        ({"held_out": 0}, "held_out"),
        ({"questions": 0}, "questions"),
        ({"lora_r": 0}, "lora_r"),
        ({"ae_steps": -1}, "ae_steps"),
        ({"d1": 0.0}, "d1"),
        ({"d1": 1.0}, "d1"),
        ({"aggregation": "mode"}, "'mode'"),
        ({"server_lr": 0.0}, "lr > 0"),
        ({"server_momentum": 1.0}, "momentum"),
        ({"representation": "state", "server_lr": 0.5}, "not on states"),
    ],
)
def test_a_bad_setting_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(named)):
        Settings(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch": 0}, "batch"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"steps": -1}, "steps"),
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr > 0"),
        ({"lr": float("nan")}, "nan"),
        ({"clip": 0.0}, "clip"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_a_bad_local_setting_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        LocalTraining(**options)


@pytest.mark.parametrize("flag", ["--targets", "--schemes", "--codecs"])
def test_an_empty_list_is_named(flag: str) -> None:
    with pytest.raises(ConfigError, match="comma-separated"):
        parsed(flag, " , ")


def test_fp32_always_comes_first_and_once() -> None:
    chosen = [s.name for s in schemes.choose(("topk", "fp32", "topk"))]
    assert chosen == ["fp32", "topk"]
    assert [s.name for s in schemes.choose(schemes.FULL)] == list(schemes.SCHEMES)


@pytest.mark.parametrize("name", schemes.SCHEMES)
def test_schemes_need_only_what_tgap_can_fit(name: str) -> None:
    assert set(schemes.SCHEMES[name].needs) <= set(schemes.TRAINED)


@pytest.mark.parametrize(
    ("options", "ratio", "wanted"),
    [
        ({}, 7.0, "gradient"),
        ({}, 32.0, "signal"),
        ({"tgap_reading": "local"}, 32.0, "update"),
        ({"clients": 4, "fraction": 0.25}, 32.0, "update"),
        ({"tgap_records": "update"}, 7.0, "update"),
        ({"tgap_records": "signal"}, 7.0, "signal"),
    ],
)
def test_a_codec_is_fitted_on_what_suits_its_ratio(
    options: dict[str, Any], ratio: float, wanted: str
) -> None:
    assert Settings(**options).records_for(ratio) == wanted
