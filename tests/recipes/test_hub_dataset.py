"""Data sets by name: the real ``datasets`` client against a loopback Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub

LOAD = """
import sys
from gradcodec.errors import ConfigError
from gradcodec.recipes import data
try:
    examples = data.load_examples(sys.argv[1])
    print(len(examples), examples[3].prompt.split()[2:4], examples[3].answer, examples[3].label)
except ConfigError as error:
    print("ConfigError", error)
"""


def load(hub: LoopbackHub, home: Path, source: str) -> str:
    """What a fresh process prints when it loads ``source`` with its Hub set to ``hub``."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, source],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def dolly(count: int) -> bytes:
    rows = (
        {
            "instruction": f"say {i}",
            "context": "",
            "response": f"word {i}",
            "category": "abc"[i % 3],
        }
        for i in range(count)
    )
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.slow
def test_dataset_comes_from_the_hub(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        hub.commit("me/dolly", {"train.jsonl": dolly(30)}, repo_type="dataset")
        printed = load(hub, tmp_path, "me/dolly")
    assert printed == "30 ['say', '3'] word 3 a\n"


@pytest.mark.slow
def test_missing_dataset_is_a_named_error(tmp_path: Path) -> None:
    with LoopbackHub() as hub:
        printed = load(hub, tmp_path, "me/nothing")
    assert printed.startswith("ConfigError cannot load the data set 'me/nothing'")
