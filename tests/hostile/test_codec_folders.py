"""Codec folders that a stranger made: a codec or a named error, at a cost like the folder's size.

``codec_folders.py`` makes and loads them, in a process of limited memory;
``GRADCODEC_HOSTILE=long`` damages more of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile.codec_folders import ATTACKS

ROOT = Path(__file__).parents[2]
COUNT = 10_000 if os.environ.get("GRADCODEC_HOSTILE") == "long" else 600

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="memory is limited as on Linux"
)


def run(*arguments: str) -> dict[str, Any]:
    """What ``codec_folders.py`` prints."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("codec_folders.py")), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def attacks() -> dict[str, Any]:
    return run("attacks")


@pytest.fixture(scope="module")
def mutations() -> dict[str, Any]:
    return run("mutations", str(COUNT), "1")


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_in_a_config_error_that_says_why(name: str, attacks: dict[str, Any]) -> None:
    outcome = attacks[name]["outcome"]
    assert outcome.startswith("ConfigError: ")
    assert ATTACKS[name][-1] in outcome


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_costs_no_more_than_its_folder_is_worth(
    name: str, attacks: dict[str, Any]
) -> None:
    # Measured at most 1 MB, where autoencoders took 1 GB and a subspace without bases 1.2 GB.
    assert attacks[name]["growth"] < (16 << 20) + 20 * attacks[name]["folder"]
    # Measured at most 0.2 s, on two busy cores 0.6 s.
    assert attacks[name]["seconds"] < 10


@pytest.mark.parametrize("name", ATTACKS)
def test_a_message_about_an_attack_is_short(name: str, attacks: dict[str, Any]) -> None:
    assert len(attacks[name]["outcome"]) < 500


def test_damaged_folders_give_a_codec_or_a_named_error(mutations: dict[str, Any]) -> None:
    assert mutations["surprises"] == []
    assert sum(mutations["outcomes"].values()) == COUNT


def test_the_damage_reaches_codecs_that_load_and_decode(mutations: dict[str, Any]) -> None:
    outcomes = mutations["outcomes"]
    assert outcomes["decoded"] + outcomes["MalformedBodyError"] > 0.02 * COUNT  # measured 0.057
    assert outcomes["HubError"] > 0.02 * COUNT  # measured 0.13


def test_damaged_folders_cost_little(mutations: dict[str, Any]) -> None:
    # Beyond the limit of address space an allocation would have failed; measured 11 MB and 0.06 s.
    assert mutations["growth"] < 200 << 20
    assert mutations["slowest"] < 10
