"""Laws of the command: what it prints is what is there; an error is one line and status 2."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loopback_hub import TOKEN, LoopbackHub
from recipes.test_experiment import write_sums

from gradcodec import cli, hub, ops
from gradcodec.chain import Chain
from gradcodec.codec import Codec
from gradcodec.codecs import BlockQuant, Identity, Subspace
from gradcodec.packers.blockquant import BlockQuantConfig
from gradcodec.registry import UNTRAINED
from gradcodec.transforms.subspace.config import Axis, SubspaceConfig
from gradcodec.types import TensorSpec, UpdateSpec
from gradcodec.wire import CODEC_IDS, Payload

ROOT = Path(__file__).parents[1]
SPEC = UpdateSpec((TensorSpec("w", (32, 8)), TensorSpec("v", (16,))))


def codec() -> Chain:
    generator = torch.Generator().manual_seed(0)
    bases = {}
    for t in SPEC:
        axis = Axis(True, t.shape[0], t.numel // t.shape[0])
        bases[t.name] = (
            axis,
            torch.linalg.qr(torch.randn(axis.size, axis.size // 4, generator=generator)).Q,
        )
    fitted = Chain(
        Subspace.from_bases(SubspaceConfig(ratio=4), SPEC, bases), BlockQuant(BlockQuantConfig(4))
    )
    fitted.notes = "fitted by a test"
    return fitted


def update() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {t.name: torch.randn(t.shape, generator=generator) for t in SPEC}


def succeed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def run(tmp_path: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    base = {k: v for k, v in os.environ.items() if not k.upper().startswith("HF_")}
    base |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from gradcodec.cli import main; sys.exit(main())",
            *list(arguments),
        ],
        env=base | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | more,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect_resnet3_shows_what_the_reconstruction_counts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = succeed(capsys, "inspect", "resnet3")
    for figure in (
        "input [1, 4096, 2048]",
        "246,785",
        "246,698",
        "[64, 64, 32]",
        "1/64 (1.5625%)",
        "754,974,720",
        "1,090,519,040",
        "1,769,996,288",
    ):
        assert figure in out
    assert re.search(r"encoder MACs +754,974,720\n", out)


@pytest.mark.parametrize(("name", "ratio"), [("cnn1d", 32), ("uformer", 64)])
def test_inspect_knows_the_other_architectures(
    name: str, ratio: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = succeed(capsys, "inspect", name, "--image", "512x256")
    assert "input [1, 512, 256]" in out
    assert f"1/{ratio} " in out


@pytest.mark.parametrize("bound", [False, True])
def test_inspect_reads_a_payload(
    bound: bool, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = codec() if bound else Identity()
    blob = made.encoder.encode(update()).to_bytes()
    path = tmp_path / "payload.bin"
    path.write_bytes(blob)
    out = succeed(capsys, "inspect", str(path))
    assert f"codec '{made.config.kind}'" in out
    assert made.digest.hex() in out
    assert f"{len(blob):,}: {len(Payload.from_bytes(blob).body):,} body" in out
    assert ("pinned by the codec digest" in out) == bound
    assert ("2 tensors, 272 elements, inline" in out) != bound


def test_inspect_reads_a_codec_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = codec()
    made.save_pretrained(tmp_path / "mine")
    out = succeed(capsys, "inspect", str(tmp_path / "mine"))
    assert made.digest.hex() in out
    assert "2 tensors, 272 elements, 1,088 bytes" in out
    assert "68 values, 1/4 of the elements" in out
    assert f"{made.nbytes():,} bytes, {1088 / made.nbytes():.4g}x" in out
    assert f"2 tensors, {made.weight_nbytes:,} bytes, fetched once" in out
    assert "fitted by a test" in out
    assert "yes: codes add" in out


# -- info ------------------------------------------------------------------------------------------


def test_info_lists_versions_families_and_bundled_codecs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = succeed(capsys, "info")
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", out, re.MULTILINE)
    assert ", ".join(CODEC_IDS) in out
    assert ", ".join(UNTRAINED) in out
    assert (", ".join(hub.bundled()) or "none") in out


def test_info_says_who_computes(capsys: pytest.CaptureFixture[str]) -> None:
    out = succeed(capsys, "info")
    for name, state in ops.status().items():
        assert re.search(rf"^ops: {name} +{re.escape(state)}$", out, re.MULTILINE)
    assert re.search(rf"^ops on cpu +{ops.implementation('cpu')}$", out, re.MULTILINE)
    assert ("ops on cuda" in out) == torch.cuda.is_available()
    # One column of names, one of values.
    starts = {re.match(r"\S+(?: \S+)*\s{2,}", line).end() for line in out.splitlines()}
    assert len(starts) == 1


@pytest.mark.parametrize("wish", ["0", "1"])
def test_info_reports_a_library_that_is_turned_off(wish: str, tmp_path: Path) -> None:
    out = run(tmp_path, "info", GRADCODEC_NATIVE=wish).stdout
    assert ("off: GRADCODEC_NATIVE=0" in out) == (wish == "0")
    if wish == "0":
        assert re.search(r"^ops on cpu +reference$", out, re.MULTILINE)


# -- errors ----------------------------------------------------------------------------------------


def test_errors_are_one_line_with_the_class_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.bin"
    blob = bytearray(Identity().encoder.encode(update()).to_bytes())
    blob[-10] ^= 1
    damaged.write_bytes(blob)
    empty = tmp_path / "empty.bin"
    empty.write_bytes(b"")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    cases = {
        ("inspect", str(damaged)): "ChecksumError",
        ("inspect", str(empty)): "TruncatedError",
        ("inspect", str(tmp_path)): "HubError",
        ("inspect", "no-such-codec"): "HubError",
        ("inspect", "resnet3", "--image", "100x100"): "ConfigError",
        ("inspect", "resnet3", "--image", "wide"): "ConfigError",
        ("push", str(tmp_path / "missing"), "user/name"): "HubError",
        ("tgap", "--out", str(tmp_path / "x"), "--ratio", "0.5"): "ConfigError",
        ("tgap", "--out", str(empty)): "ConfigError",
        ("tgap", "--out", ""): "ConfigError",
        ("tgap", "--out", str(tmp_path / "model")): "ConfigError",
        ("run-federated", "--out", ".."): "ConfigError",
        ("run-federated", "--out", str(empty)): "ConfigError",
        ("run-federated", "--schemes", "zip"): "ConfigError",
        # Options that nothing would read beside the others.
        ("run-federated", "--epochs", "2"): "ConfigError",
        ("tgap", "--out", str(tmp_path / "x"), "--epochs", "2"): "ConfigError",
        ("tgap", "--out", str(tmp_path / "x"), "--ae-steps", "2"): "ConfigError",
        ("tgap", "--out", str(tmp_path / "x"), "--family", "cnn1d", "--ratio", "8"): "ConfigError",
        ("inspect", "int4", "--image", "64x64"): "ConfigError",
        ("inspect", "resnet3", "--tensors"): "ConfigError",
        ("inspect", "resnet3", "--revision", "main"): "ConfigError",
        ("inspect", "int4", "--revision", "main"): "HubError",
        ("inspect", str(damaged), "--revision", "main"): "ConfigError",
    }
    for arguments, error in cases.items():
        assert refused(capsys, *arguments).startswith(f"gradcodec: {error}: "), arguments


@pytest.mark.parametrize(
    "arguments",
    [
        *((), ("unpack",), ("inspect",), ("run-federated", "--rounds", "many"), ("info", "--all")),
        ("tgap", "--out", "x", "--rounds", "3"),  # it has none; --tgap-rounds are not meant by it
    ],
)
def test_a_command_line_that_makes_no_sense_is_status_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    assert "usage: gradcodec" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["inspect", "push", "info", "run-federated", "tgap"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: gradcodec {command}")


@pytest.mark.parametrize("command", ["run-federated", "tgap"])
def test_every_setting_says_what_it_is_and_its_default(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--clients CLIENTS how many there are (40)" in text
    assert "--lr LR a client's learning rate in the first round; it falls to 0 (0.012)" in text
    assert "--targets TARGETS comma-separated modules that get an adapter (q_proj,k_proj" in text


# -- processes ------------------------------------------------------------------------------------


def test_a_codec_is_pushed_and_comes_back(tmp_path: Path) -> None:
    codec().save_pretrained(tmp_path / "mine")
    with LoopbackHub() as server:
        env = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN}
        pushed = run(tmp_path, "push", "mine", "user/mine", "--message", "first", **env)
        assert pushed.returncode == 0, pushed.stderr
        assert pushed.stdout.startswith(f"{server.endpoint}/user/mine/commit/")
        found = run(tmp_path, "inspect", "user/mine", **env)
        assert found.returncode == 0, found.stderr
        assert codec().digest.hex() in found.stdout
        env["HF_TOKEN"] = "hf_wrong"
        denied = run(tmp_path, "push", "mine", "user/mine", **env)
    assert denied.returncode == 2
    assert denied.stderr.splitlines()[-1].startswith("gradcodec: HubError: ")
    assert "Traceback" not in denied.stderr


TGAP = [
    "--limit=300",
    "--clients=4",
    "--fraction=0.5",
    "--held-out=20",
    "--tgap-rounds=1",
    "--min-client=2",
    "--max-length=32",
    "--steps=1",
    "--lora-r=4",
    "--targets=q_proj,v_proj",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "bits", "options"),
    [
        ("subspace", "0", ["--ratio", "16"]),
        ("subspace", "1", ["--ratio", "16", "--basis-dtype", "int4", "--share", "inputs"]),
        ("resnet3", "4", ["--ae-steps", "2"]),
    ],
)
def test_tgap_writes_a_codec_that_can_be_loaded_and_used(
    family: str, bits: str, options: list[str], tmp_path: Path
) -> None:
    arguments = ["tgap", "--out", "mine", "--family", family, "--bits", bits]
    arguments += options
    if family == "subspace":  # the bundled examples take seconds to read: once is enough
        arguments += ["--dataset", str(write_sums(tmp_path / "sums.jsonl"))]
    done = run(tmp_path, *arguments, *TGAP)
    assert done.returncode == 0, done.stderr
    made = Codec.from_pretrained(tmp_path / "mine")
    assert made.config.kind == ("subspace" if bits == "0" else "chain")
    assert made.digest.hex() in done.stdout
    assert made.notes is not None
    assert "LoRA r=4, q_proj, v_proj" in made.notes
    assert made.spec is not None
    assert {t.shape[0] if "lora_A" in t.name else t.shape[1] for t in made.spec} == {4}
    zeros = {t.name: torch.zeros(t.shape) for t in made.spec}
    decoded = made.decoder.decode(made.encoder.encode(zeros))
    assert list(decoded) == [t.name for t in made.spec]
    described = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert described["notes"] == made.notes
    assert made.notes.startswith(("common part of updates of embedded", "updates of embedded"))
    again = run(tmp_path, *arguments, *TGAP)
    assert again.returncode == 0, again.stderr
    assert Codec.from_pretrained(tmp_path / "mine").digest == made.digest
