"""What is shown is run: the multi-process examples, the programs of frameworks.md and index.md."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import processes
import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "frameworks.md").read_text()
PROGRAMS = {
    name: source
    for source in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    for name in re.findall(r"(\w+)_ddp\.py", source.partition("\n")[0])
}

slow = pytest.mark.slow
needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="needs: pip install transformers"
)


def launched(program: Path, *arguments: str, ranks: int = 2, torchrun: bool = True) -> str:
    """Standard output of a program in so many processes on this machine."""
    done = processes.launched(program, *arguments, ranks=ranks, torchrun=torchrun)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def losses(out: str) -> list[float]:
    return [float(n) for n in re.findall(r"held-out loss (\d+\.\d+)", out)]


def times_less(out: str) -> float:
    (found,) = re.findall(r"([\d.]+)x (?:less|fewer bytes)", out)
    return float(found)


@slow
@needs_transformers
def test_diloco_learns_from_few_bytes_and_replicas_stay_equal() -> None:
    out = launched(ROOT / "examples" / "diloco.py", "--rounds", "2", "--inner", "6")
    first, *_, last = losses(out)
    assert last < first - 1.0
    assert 60 < times_less(out) < 6 * 17
    assert "replicas equal to the bit: True" in out


@slow
@needs_transformers
def test_fsdp2_learns_from_an_eighth_of_the_bytes() -> None:
    out = launched(ROOT / "examples" / "fsdp2_llama.py", "--steps", "8")
    first, *_, last = losses(out)
    assert last < first - 1.0
    assert 7.5 < times_less(out) < 8.1
    assert re.search(r"error feedback +0 B", out)


@slow
@needs_transformers
def test_hsdp_keeps_feedback_for_its_replicas_only() -> None:
    example = ROOT / "examples" / "fsdp2_llama.py"
    out = launched(example, "--steps", "3", "--replicas", "2", ranks=2)
    first, *_, last = losses(out)
    assert last < first - 0.3
    assert 7.5 < times_less(out) < 8.1
    assert not re.search(r"error feedback +0 B", out)


@slow
@needs_transformers
def test_ddp_learns_from_an_eighth_of_the_bytes() -> None:
    out = launched(ROOT / "examples" / "ddp_llama.py", "--steps", "8")
    first, *_, last = losses(out)
    assert last < first - 1.0
    assert 7.5 < times_less(out) < 8.1


def test_the_page_has_a_program_for_each_framework() -> None:
    assert set(PROGRAMS) == {"accelerate", "trainer", "lightning"}


@slow
@pytest.mark.parametrize("name", ["accelerate", "trainer", "lightning"])
def test_programs_of_the_page_train_with_compressed_gradients(name: str, tmp_path: Path) -> None:
    package = "transformers" if name == "trainer" else name
    if find_spec(package) is None:
        pytest.skip(f"needs: pip install {package}")
    program = tmp_path / f"{name}_ddp.py"
    program.write_text(PROGRAMS[name])
    out = launched(program, torchrun=name != "lightning")
    (loss,) = re.findall(r"^loss (\d+\.\d+), .* replicas equal: True", out, re.MULTILINE)
    # Untrained: 2.3 nats over ten classes, 5.4 on docstrings. The Trainer tells the mean of all
    # steps.
    assert float(loss) < (4.2 if name == "trainer" else 1.2)
    # Small tensors pay for a header in every message.
    assert times_less(out) > (7.0 if name == "trainer" else 3.0)


@slow
def test_the_first_program_of_the_site_runs_as_its_first_line_says(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "index.md").read_text()
    source = page.partition("```python\n")[2].partition("```")[0]
    assert source.startswith("# torchrun --nproc-per-node 2 quick_ddp.py\n")
    program = tmp_path / "quick_ddp.py"
    program.write_text(source)
    shown = re.compile(r"^ *loss (\d\.\d+), ([\d,]+) bytes sent instead of ([\d,]+)$", re.MULTILINE)
    (printed,), (promised,) = shown.findall(launched(program)), shown.findall(page)
    assert printed[1:] == promised[1:]
    assert float(printed[0]) == pytest.approx(float(promised[0]), abs=0.05)


@slow
def test_a_client_of_the_plain_loop_leaves_and_comes_back() -> None:
    script = ROOT / "examples" / "plain_loop.py"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=env, timeout=150
    )
    assert done.returncode == 0, done.stderr
    clients = re.findall(r"^round \d  clients (\[.*\]) ", done.stdout, re.MULTILINE)
    everybody, two = "[0, 1, 2]", "[0, 1]"
    assert clients == [everybody] * 2 + [two] * 2 + [everybody] * 4
    first, *_, last = losses(done.stdout)
    assert last < first - 1.0


def test_every_example_is_in_the_table() -> None:
    table = (ROOT / "examples" / "README.md").read_text()
    there = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert set(re.findall(r"^\| \[(\w+\.py)\]", table, re.MULTILINE)) == there


@pytest.mark.slow
def test_flower_llama_runs_in_a_deployment() -> None:
    pytest.importorskip("flwr")
    script = ROOT / "examples" / "flower_llama" / "run.py"
    done = subprocess.run(
        [sys.executable, script, "--rounds", "2", "--steps", "2"],
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["losses"]) == 3
    assert found["losses"][-1] < found["losses"][0] - 0.3
    # 98,304 adapter values in fp32, of two nodes in two rounds, headers not counted.
    assert found["up"] < 2 * 2 * 98_304 * 4 / 3
