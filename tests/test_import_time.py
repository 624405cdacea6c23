"""Importing gradcodec loads nothing before it is used, and nothing optional.

No clock: what is loaded is what it costs.
"""

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


@pytest.mark.parametrize(
    "statement", ["import gradcodec; gradcodec.Codec", "from gradcodec import *"]
)
def test_nothing_optional_is_imported(statement: str) -> None:
    script = SCRIPT.format(statement=statement)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "gradcodec" in loaded
    assert loaded & OPTIONAL == set()


@pytest.mark.parametrize(
    "statement",
    [
        "import gradcodec; gradcodec.__version__; gradcodec.errors.ConfigError",
        "import gradcodec.cli\ntry: gradcodec.cli.main(['--help'])\nexcept SystemExit: pass",
        "from gradcodec.integrations.flower import CompressMod; CompressMod()",
        "from flwr.clientapp import ClientApp\n"
        "from gradcodec.integrations.flower import CompressMod\n"
        "ClientApp(mods=[CompressMod()])",
    ],
)
def test_torch_is_loaded_by_its_first_use(statement: str) -> None:
    if "flower" in statement:
        pytest.importorskip("flwr")
    script = f"import sys\n{statement}\nassert 'torch' not in sys.modules\n"
    script += "import gradcodec; gradcodec.make_codec('int4'); assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_a_kind_is_found_by_whoever_imported_codecs_alone() -> None:
    script = (
        "from gradcodec.codec import Codec\n"
        "print(type(Codec.from_pretrained('stdlib-llama-lora-r8-7x')).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "Chain\n", done.stderr
