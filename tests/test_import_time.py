"""Importing gradcodec loads nothing optional. No clock: what is loaded is what it costs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = {
    "accelerate",
    "constriction",
    "datasets",
    "flwr",
    "huggingface_hub",
    "lightning",
    "lm_eval",
    "matplotlib",
    "nvflare",
    "peft",
    "tokenizers",
    "transformers",
    "triton",
}

SCRIPT = """
import json, sys
import numpy, safetensors.torch, torch
before = set(sys.modules)
{statement}
print(json.dumps(sorted(m.split(".")[0] for m in set(sys.modules) - before)))
"""


@pytest.mark.parametrize("statement", ["import gradcodec", "from gradcodec import *"])
def test_nothing_optional_is_imported(statement: str) -> None:
    script = SCRIPT.format(statement=statement)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "gradcodec" in loaded
    assert loaded & OPTIONAL == set()
