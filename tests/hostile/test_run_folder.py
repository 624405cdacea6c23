"""Attacks on a run's folder: changed bits, cuts, two users at once, kills at any moment.

``GRADCODEC_HOSTILE=long`` tries every bit and many more kills.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from federated.test_checkpoint import make, run

from gradcodec import files
from gradcodec.errors import ConfigError
from gradcodec.federated import checkpoint
from gradcodec.recipes.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
LONG = os.environ.get("GRADCODEC_HOSTILE") == "long"
ROWS = [{"scheme": "fp32", "round": n, "loss": 1.5 - n / 7, "title": "é"} for n in range(6)]


def flips(blob: bytes) -> Iterator[bytes]:
    """``blob`` with one bit changed, in each of its bytes; every bit in the long form."""
    chance = random.Random(0)
    for at in range(len(blob)):
        for bit in range(8) if LONG else [chance.randrange(8)]:
            yield blob[:at] + bytes([blob[at] ^ 1 << bit]) + blob[at + 1 :]


def cuts(blob: bytes) -> Iterator[bytes]:
    """``blob`` ended too early, and a little too late."""
    step = 1 if LONG else max(1, len(blob) // 500)
    yield from (blob[:size] for size in range(0, len(blob), step))
    yield from (blob + tail for tail in (b"\0", b"\n", b" ", blob))


def sealed_checkpoint(folder: Path) -> Path:
    run(make(), [], folder / "x.safetensors", 2)
    files.previous(folder / "x.safetensors").unlink()
    return folder / "x.safetensors"


def sealed_json(folder: Path) -> Path:
    with RunFolder(folder, {"rounds": 3}) as held:
        held.save("x.json", {"reports": ROWS, "digest": "0" * 64, "text": '"sha256": "'})
    return folder / "x.json"


def load_checkpoint(path: Path) -> None:
    checkpoint.load(path, make())


def load_json(path: Path) -> None:
    files.load_json(path, "delete it")


READERS = {
    "checkpoint": (sealed_checkpoint, load_checkpoint),
    "json": (sealed_json, load_json),
}


@pytest.mark.parametrize("kind", READERS)
def test_no_changed_bit_and_no_cut_is_accepted(kind: str, tmp_path: Path) -> None:
    write, read = READERS[kind]
    path = write(tmp_path)
    read(path)
    whole = path.read_bytes()
    tried = 0
    for blob in (*flips(whole), *cuts(whole)):
        tried += 1
        assert files.damage(blob) is not None, tried
    assert tried > len(whole)
    # The readers ask ``damage`` before anything else; a few through them, in every region.
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(ConfigError, match=r"is damaged .*; delete it"):
            read(path)
    for size in (0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"is damaged .*; delete it"):
            read(path)


def test_a_changed_bit_in_the_settings_never_starts_another_run(tmp_path: Path) -> None:
    settings = {"rounds": 3, "lr": 0.25, "targets": ["q", "v"]}
    with RunFolder(tmp_path, settings) as folder:
        folder.log("start", loss=1.0)
    path = tmp_path / "config.json"
    for blob in list(flips(path.read_bytes())):
        path.write_bytes(blob)
        with pytest.raises(ConfigError, match=r"config\.json is (damaged|not the settings)"):
            RunFolder(tmp_path, settings, resume=True)
        assert path.read_bytes() == blob


def test_a_changed_bit_in_the_events_costs_its_lines_and_is_mended(tmp_path: Path) -> None:
    """One that changes a line's end joins two lines, so it costs both."""

    def log(folder: RunFolder) -> None:
        for row in ROWS:
            folder.log("round", **row)

    with RunFolder(tmp_path, {}) as folder:
        log(folder)
    path = tmp_path / "events.jsonl"
    whole = path.read_bytes()
    lines = set(whole.splitlines())
    damaged = [*flips(whole), *cuts(whole)]
    for blob in damaged if LONG else [*random.Random(1).sample(damaged, 60), whole + whole]:
        path.write_bytes(blob)
        with RunFolder(tmp_path, {}, resume=True) as folder:
            left = path.read_bytes().splitlines()
            assert lines.issuperset(left)
            assert len(left) >= min(len(lines) - 2, blob.count(b"\n") - 1)
            log(folder)
        assert sorted(path.read_bytes().splitlines()) == sorted(lines)


def script(text: str, *arguments: str | Path, timeout: float = 110) -> str:
    """Run a program in a process of its own, which may fork: this one has threads."""
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


CONCURRENT = """
import os, sys
from pathlib import Path
from federated.test_checkpoint import make, run
from gradcodec.federated import checkpoint

path, saves = Path(sys.argv[1]) / "x.safetensors", int(sys.argv[2])
federation, reports = make(), []
run(federation, reports, path, 2)
children = []
for _ in range(2):
    if (child := os.fork()) == 0:
        for _ in range(saves):
            checkpoint.save(path, federation, reports)
        os._exit(0)
    children.append(child)
reads = 0
while children:
    assert len(checkpoint.load(path, make())) == 2
    reads += 1
    ended, status = os.waitpid(-1, os.WNOHANG)
    if ended:
        assert status == 0, status
        children.remove(ended)
print(reads)
"""


def test_processes_that_save_to_one_path_never_tear_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reads = int(script(CONCURRENT, tmp_path, "600" if LONG else "30"))
    assert reads > 1
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {"x.safetensors", "x.safetensors.previous"}
    assert caplog.text == ""


LOCKS = """
import os, signal, sys, time
from gradcodec.errors import ConfigError
from gradcodec.recipes.run_folder import RunFolder

path, entered = sys.argv[1], 0
for _ in range(int(sys.argv[2])):
    # Two at the same moment: one gets in, and is killed with the folder in its hands.
    ready, children = os.pipe(), []
    for _ in range(2):
        if (child := os.fork()) == 0:
            try:
                folder = RunFolder(path, {})
            except ConfigError as err:
                os.write(ready[1], b"n" if "in use" in str(err) else b"?")
                os._exit(0)
            os.write(ready[1], b"y")
            time.sleep(60)
        children.append(child)
    answers = os.read(ready[0], 1) + os.read(ready[0], 1)
    assert sorted(answers) == sorted(b"yn"), answers
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    entered += 1
print(entered)
"""


def test_a_lock_lets_one_in_and_ends_with_its_process(tmp_path: Path) -> None:
    tries = "200" if LONG else "20"
    assert script(LOCKS, tmp_path / "run", tries).strip() == tries


TGAP = """
import json, os, random, signal, sys, time
from dataclasses import replace
from pathlib import Path
from gradcodec.recipes.federated_llama import Experiment
from gradcodec.recipes.run_folder import RunFolder
from gradcodec.recipes.schemes import TRAINED
from gradcodec.recipes.settings import Settings
from gradcodec.recipes.task import LocalTraining

root, reading, kills = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
settings = Settings(
    dataset=str(root / "sums.jsonl"), clients=4, fraction=0.5, rounds=1, held_out=10, questions=2,
    tgap_rounds=3, tgap_reading=reading, ae_steps=4, min_client=2, max_length=16, lora_r=2,
    targets=("q_proj", "v_proj"), local=LocalTraining(steps=1),
)
configs = {n: TRAINED[n] for n in ("subspace-7", "subspace-32", "resnet3-working")}
with RunFolder(root / "whole", settings.to_dict()) as folder:
    experiment = Experiment(settings, folder, lambda *_: None)
    began = time.perf_counter()
    whole = {n: c.digest.hex() for n, c in experiment.fit(configs, "codecs").items()}
    took = time.perf_counter() - began
    cost = folder.load("tgap.json")

chance, phases = random.Random(0), set()
def attempt(path):
    with RunFolder(path, settings.to_dict(), resume=True) as folder:
        experiment.folder = folder
        codecs = experiment.fit(configs, "codecs")
        return {n: c.digest.hex() for n, c in codecs.items()}, folder.load("tgap.json")

path = root / "killed"
for number in range(kills):
    if (child := os.fork()) == 0:
        try:
            if number == 0:  # certainly with something kept; the others anywhere
                experiment.progress = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            attempt(path)
        finally:
            os._exit(0)
    if number:
        time.sleep(chance.uniform(0, took))
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    there = [p.name for p in path.iterdir()] if path.exists() else []
    phases.add("fitted" if "tgap.json" in there else
               "kept" if "tgap.safetensors" in there else "nothing kept")
ended, its_cost = attempt(path)
assert ended == whole, (ended, whole)
for key in ("uplink_bytes", "downlink_bytes", "statistics_bytes_per_client", "digests"):
    assert its_cost[key] == cost[key], key
assert not (path / "tgap.safetensors").exists()
print(json.dumps(sorted(phases)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("reading", ["federated", "local"])
def test_kills_during_tgap_change_no_bit_of_its_codecs(reading: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + {i}?", "answer": f" {2 * i}"} for i in range(60)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    kills = "60" if LONG else "4"
    phases = json.loads(script(TGAP, tmp_path, reading, kills, timeout=1000 if LONG else 110))
    assert "kept" in phases
