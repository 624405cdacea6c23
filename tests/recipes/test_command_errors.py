"""What a person at the command line meets: one line, a status, and a run that can go on."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recipes.test_experiment import FLAGS, command, environment, refused, run_command, write_sums

from gradcodec import files
from gradcodec.errors import ConfigError
from gradcodec.recipes import data
from gradcodec.recipes.models import EMBEDDED_FOLDER, load_base


def last_line(stderr: str) -> str:
    """The one line that the command itself wrote; progress bars stand before it."""
    lines = [line for line in stderr.splitlines() if line.startswith("gradcodec: ")]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == lines[0]
    return lines[0]


def damaged_model(change: str, folder: Path) -> Path:
    shutil.copytree(EMBEDDED_FOLDER, folder)
    if change == "cut weights":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:100_000])
        return folder
    if change == "cut tokenizer":
        (folder / "tokenizer.json").write_text("{")
        return folder
    config = json.loads((folder / "config.json").read_text())
    change, value = change.split("=")
    config[change] = int(value)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "change", ["cut weights", "cut tokenizer", "hidden_size=-5", "hidden_size=48"]
)
def test_a_damaged_model_is_named(change: str, tmp_path: Path) -> None:
    model = str(damaged_model(change, tmp_path / "model"))
    with pytest.raises(ConfigError, match=f"cannot load the model {model!r}"):
        load_base(model)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "No such file"),
        (b'{"prompt": "\xe9", "answer": "b"}\n', "utf-8"),
        (b'{"prompt": "a", "answer": \n', "line 1 is not JSON"),
        (b"[" * 100_000 + b"\n", "line 1 is not JSON"),
        (b'{"a": 1}\n', "unknown columns"),
        (b"", "holds no rows"),
    ],
)
def test_a_bad_data_file_is_named(content: bytes | None, named: str, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"data.jsonl.*{named}"):
        data.load_examples(str(path))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--seed", "-1"), "seed"),
        (("--seed", str(1 << 62)), "seed"),
        (("--lora-alpha", "nan"), "lora_alpha"),
        (("--lora-alpha", "inf"), "lora_alpha"),
        (("--min-client", "-1"), "min_client"),
    ],
)
def test_numbers_that_numpy_and_torch_would_choke_on_are_refused(
    options: tuple[str, str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = refused(capsys, *options, "--out", str(tmp_path / "run"))
    assert f"ConfigError: expected {'a ' if named != 'min_client' else ''}" in line
    assert named in line
    assert not (tmp_path / "run").exists()


# -- pipes -----------------------------------------------------------------------------------------


def output_to(stdout: Any, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from gradcodec.cli import main; sys.exit(main(['info']))"
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=environment(tmp_path),
        text=True,
        timeout=100,
    )


def test_a_reader_that_has_gone_away_is_one_line(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = output_to(write, tmp_path)
    os.close(write)
    assert (done.returncode, done.stderr) == (2, "gradcodec: nobody reads the output any more\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has this device")
def test_output_that_finds_no_room_is_one_line(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = output_to(full, tmp_path)
    assert done.returncode == 2
    assert "No space left on device" in last_line(done.stderr)


# -- runs ------------------------------------------------------------------------------------------


def arguments(tmp_path: Path, *more: str) -> list[str]:
    sums = str(write_sums(tmp_path / "sums.jsonl"))
    return [*FLAGS, "--dataset", sums, "--schemes", "fp32", "--out", "run", *more]


def wait_for(reached: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    while not reached():
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.005)


def start(tmp_path: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*options),
        env=environment(tmp_path),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux can limit another process")
def test_a_disk_without_room_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """Files may become as large as the first checkpoint; the next one is larger."""
    options = arguments(tmp_path, "--rounds=6", "--resume")
    path = tmp_path / "run" / "checkpoints" / "fp32.safetensors"
    run = start(tmp_path, *options)
    try:
        wait_for(path.exists, run)
        room = path.stat().st_size + 1000
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (room, room))
        _, stderr = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 2
    line = last_line(stderr)
    assert "File too large" in line
    assert "fp32.safetensors" in line
    assert line.endswith("what is finished is in run: go on with the same options and --resume")
    assert not any(files.is_temporary(p.name) for p in path.parent.iterdir())
    kept = len(files.load_tensors(path, "")[1]["reports"])
    assert 1 <= kept < 6
    done = run_command(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(r) for r in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [r["round"] for r in rows if r["event"] == "round"] == list(range(6))


@pytest.mark.slow
def test_a_second_user_is_turned_away_and_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    options = arguments(tmp_path, "--rounds=500")
    first = start(tmp_path, *options)
    try:
        path = tmp_path / "run" / "checkpoints" / "fp32.safetensors"
        wait_for(path.exists, first)
        second = run_command(tmp_path, *options, "--resume")
        assert second.returncode == 2
        line = last_line(second.stderr)
        assert line.startswith(f"gradcodec: ConfigError: run is in use by process {first.pid} on ")
        kept = path.stat().st_mtime_ns
        wait_for(lambda: path.stat().st_mtime_ns != kept, first)  # it has not noticed anything
        first.send_signal(signal.SIGINT)
        _, stderr = first.communicate(timeout=60)
    finally:
        first.kill()
    assert first.returncode == 130
    line = last_line(stderr)
    assert line.startswith("gradcodec: interrupted; what is finished is in run: go on with")
    assert line.endswith("--resume")
