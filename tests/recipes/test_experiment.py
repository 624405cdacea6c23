"""The whole example, very small: every scheme, other models, kills at any moment, bad requests."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from loopback_hub import LoopbackHub

from gradcodec import cli
from gradcodec.codec import Codec
from gradcodec.recipes.federated_llama import Experiment
from gradcodec.recipes.models import EMBEDDED_FOLDER
from gradcodec.recipes.report import plot, table
from gradcodec.recipes.results import summarise
from gradcodec.recipes.run_folder import RunFolder
from gradcodec.recipes.schemes import FULL, TRAINED
from gradcodec.recipes.settings import Settings
from gradcodec.recipes.task import LocalTraining

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "limit": 300,
    "clients": 4,
    "fraction": 0.5,
    "rounds": 2,
    "held_out": 20,
    "questions": 4,
    "tgap_rounds": 1,
    "ae_steps": 2,
    "min_client": 2,
    "max_length": 32,
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, "steps": 1}.items()]
#: Differ between equal runs: how long things took.
TIMES = ("encode_s", "decode_s", "seconds")


def run_experiment(path: Path, **options: Any) -> dict[str, Any]:
    settings = Settings(**{**TINY, "local": LocalTraining(steps=1), **options})
    told: list[tuple[str, int, int]] = []
    with RunFolder(path, settings.to_dict()) as folder:
        results = Experiment(settings, folder, lambda *row: told.append(row[:3])).run()
        assert all(0 <= done <= total for _, done, total in told)
        return summarise(settings, results, folder.load("tgap.json"))


def timeless(summary: dict[str, Any]) -> dict[str, Any]:
    rows = [{k: v for k, v in s.items() if k not in TIMES} for s in summary["schemes"]]
    tgap = {k: v for k, v in (summary["tgap"] or {}).items() if not k.endswith("_s")}
    return {**summary, "schemes": rows, "tgap": tgap}


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    base = {k: v for k, v in os.environ.items() if not k.upper().startswith("HF_")}
    base |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    return base | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "CUDA_VISIBLE_DEVICES": ""} | more


def command(*arguments: str) -> list[str]:
    start = "import sys; from gradcodec.cli import main; sys.exit(main())"
    return [sys.executable, "-c", start, "run-federated", *arguments]


def run_command(
    tmp_path: Path, *arguments: str, timeout: float = 110, **more: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments),
        env=environment(tmp_path, **more),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def write_sums(path: Path) -> Path:
    """Questions and answers that take no time to read."""
    rows = [
        {"prompt": f"What is {i} + {i}?", "answer": f" {2 * i}", "label": "ab"[i % 2]}
        for i in range(120)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("run") / "all"
    return path, run_experiment(path, schemes=FULL)


@pytest.mark.slow
def test_every_scheme_runs_end_to_end(everything: tuple[Path, dict[str, Any]]) -> None:
    path, summary = everything
    rows = {s["name"]: s for s in summary["schemes"]}
    assert tuple(rows) == FULL
    assert {s["start_loss"] for s in rows.values()} == {rows["fp32"]["start_loss"]}
    for name, row in rows.items():
        assert row["rounds"] == (0 if name == "base" else 2), name
        assert row["accuracy"] in (0, 0.25, 0.5, 0.75, 1)
        coded = name not in ("base", "centralised")
        assert (row["uplink_bytes"] > 0) == coded
        assert (row["codec_bytes"] > 0) == name.startswith(("paper", "subspace"))
        assert row["rejected"] == 0
        if coded and name != "fp32":
            assert 1 < row["uplink_ratio"] < 2000
    for codec in TRAINED:
        assert Codec.from_pretrained(path / "codecs" / codec).notes
    assert rows["fp32"]["final_loss"] < rows["fp32"]["start_loss"]


@pytest.mark.slow
def test_ratios_are_those_of_the_codecs(everything: tuple[Path, dict[str, Any]]) -> None:
    rows = {s["name"]: s for s in everything[1]["schemes"]}
    assert rows["fp16"]["uplink_ratio"] == pytest.approx(2, rel=0.01)
    assert rows["sign"]["uplink_ratio"] == pytest.approx(32 / (1 + 16 / 256), rel=0.01)
    assert rows["paper-literal"]["uplink_ratio"] == pytest.approx(64, rel=0.02)
    assert rows["subspace-7"]["uplink_ratio"] == pytest.approx(7 * 16 / (1 + 1 / 16), rel=0.15)
    assert rows["subspace-32"]["uplink_ratio"] > rows["subspace-7"]["uplink_ratio"]


@pytest.mark.slow
def test_its_table_and_plots_are_made(
    everything: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    summary = json.loads(json.dumps(everything[1], allow_nan=False))
    text = table(summary)
    assert all(s["title"] in text for s in summary["schemes"])
    assert len(plot(summary, tmp_path)) == 3


@pytest.mark.slow
def test_a_finished_run_is_read_again_and_not_made_again(
    everything: tuple[Path, dict[str, Any]],
) -> None:
    path, summary = everything
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*.safetensors")}
    settings = Settings(**{**TINY, "local": LocalTraining(steps=1), "schemes": FULL})
    with RunFolder(path, settings.to_dict(), resume=True) as folder:
        results = Experiment(settings, folder, lambda *_: None).run()
        again = summarise(settings, results, folder.load("tgap.json"))
    assert again == summary
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*.safetensors")} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"representation": "state", "schemes": ("paper-working",)},
        {"representation": "balanced", "aggregation": "sum", "schemes": ("paper-literal",)},
        {"tgap_records": "gradient", "schemes": ("subspace-32",), "server_momentum": 0.5},
        {"tgap_records": "signal", "schemes": ("subspace-32",)},
        {"tgap_reading": "local", "tgap_records": "state", "schemes": ("subspace-32",)},
        {"dtype": "bfloat16", "gradient_checkpointing": True, "schemes": ("subspace-7",)},
        {"lora_r": 3, "targets": ("up_proj", "down_proj"), "schemes": ("subspace-post", "topk")},
    ],
    ids=["state", "balanced-sum", "gradient", "signal", "local", "bf16", "mlp"],
)
def test_every_reading_runs(options: dict[str, Any], tmp_path: Path) -> None:
    summary = run_experiment(tmp_path / "run", **options)
    names = [s["name"] for s in summary["schemes"]]
    assert names == ["fp32", *options["schemes"]]
    assert all(s["losses"] for s in summary["schemes"])


@pytest.mark.slow
def test_a_model_and_data_of_ones_own(tmp_path: Path) -> None:
    """Grouped-query attention, non-square projections, odd rank, a model from the Hub."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_FOLDER)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    data = write_sums(tmp_path / "sums.jsonl")
    with LoopbackHub() as hub:
        hub.commit("user/tiny", tmp_path / "tiny")
        done = run_command(
            tmp_path,
            *("--model", "user/tiny", "--dataset", str(data), "--lora-r", "3"),
            *("--targets", "q_proj,v_proj,down_proj", "--out", "run", *FLAGS),
            *("--schemes", "subspace-32,paper-working,paper-literal"),
            HF_ENDPOINT=hub.endpoint,
        )
        assert any("model.safetensors" in path for _, path in hub.requests)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    names = ["fp32", "subspace-32", "paper-working", "paper-literal"]
    assert [s["name"] for s in summary["schemes"]] == names
    for name in ("loss_rounds", "loss_bytes", "snr", "autoencoders"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 5000
    assert "subspace 1/32" in done.stdout
    spec = Codec.from_pretrained(tmp_path / "run" / "codecs" / "subspace-32").spec
    assert spec is not None
    shapes = {t.shape for t in spec}
    assert shapes == {(3, 48), (48, 3), (24, 3), (3, 80)}  # v_proj has half the heads


def kill_when(tmp_path: Path, arguments: list[str], reached: Any) -> None:
    """Start a run and SIGKILL it as soon as it got so far."""
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(
            command(*arguments), env=environment(tmp_path), cwd=tmp_path, stdout=log, stderr=log
        )
        try:
            while run.poll() is None and not reached():
                time.sleep(0.005)
            assert run.poll() is None, (tmp_path / "log").read_text()
            run.send_signal(signal.SIGKILL)
        finally:
            run.kill()
            run.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    data = write_sums(tmp_path / "sums.jsonl")
    arguments = [*FLAGS, "--rounds=3", "--tgap-rounds=3"]
    arguments += ["--schemes", "subspace-32,paper-working"]
    arguments += ["--dataset", str(data)]
    whole = run_command(tmp_path, *arguments, "--out", "whole", timeout=500)
    assert whole.returncode == 0, whole.stderr

    run = tmp_path / "killed"
    arguments += ["--out", "killed", "--resume"]

    def snapshots() -> int:
        return len(list(run.glob("snapshots/*.safetensors")))

    # TGAP, of three rounds with two clients each: within its first, after it, within its second.
    kill_when(tmp_path, arguments, lambda: snapshots() > 0)
    assert not (run / "tgap.safetensors").exists()
    kill_when(tmp_path, arguments, lambda: (run / "tgap.safetensors").exists())
    kept = (run / "tgap.safetensors").stat().st_mtime_ns
    kill_when(tmp_path, arguments, lambda: snapshots() > 2)
    assert (run / "tgap.safetensors").stat().st_mtime_ns == kept
    assert not (run / "tgap.json").exists()
    kill_when(tmp_path, arguments, lambda: (run / "checkpoints" / "fp32.safetensors").exists())
    kill_when(
        tmp_path, arguments, lambda: (run / "checkpoints" / "subspace-32.safetensors").exists()
    )
    assert not (run / "summary.json").exists()
    done = run_command(tmp_path, *arguments, timeout=500)
    assert done.returncode == 0, done.stderr

    pair = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "killed")]
    assert timeless(pair[0]) == timeless(pair[1])
    events = [
        [json.loads(line) for line in (tmp_path / n / "events.jsonl").read_text().splitlines()]
        for n in ("whole", "killed")
    ]
    keys = [[(e["event"], e.get("scheme"), e.get("round")) for e in rows] for rows in events]
    assert keys[0] == keys[1]

    other = run_command(tmp_path, *arguments, "--rounds=4")
    assert other.returncode == 2
    assert "ConfigError" in other.stderr
    assert "'rounds': (3, 4)" in other.stderr
    assert json.loads((run / "summary.json").read_text()) == pair[1]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a request that cannot be met."""
    assert cli.main(["run-federated", *arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("gradcodec: ")]
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1] == lines[0]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.slow
def test_targets_that_the_model_lacks_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = str(tmp_path / "run")
    line = refused(capsys, *FLAGS, "--targets", "q_proj,c_attn", "--out", out)
    assert line.startswith("gradcodec: ConfigError: ")
    assert "c_attn" in line
    assert "q_proj, k_proj" in line
    # Corrected, the same command goes on without --resume.
    line = refused(capsys, *FLAGS, "--targets", "q_proj", "--clients", "4000", "--out", out)
    assert "4000 clients" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU shows this")
def test_a_gpu_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = refused(capsys, *FLAGS, "--device", "cuda", "--out", str(tmp_path / "run"))
    assert "ConfigError: device 'cuda' was asked for" in line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--schemes", "zip"), "'zip'"),
        (("--rounds", "0"), "rounds"),
        (("--dtype", "int4"), "'int4'"),
        (("--model", "/nowhere"), "/nowhere"),
    ],
)
def test_bad_requests_are_one_line(
    arguments: tuple[str, str], named: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert named in refused(capsys, *arguments, "--out", str(tmp_path / "run"))
