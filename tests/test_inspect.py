"""Laws of ``gradcodec inspect`` with an update: what it draws is what the codec does."""

import builtins
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import UPDATES
from safetensors.torch import save_file
from test_cli import SPEC, codec, refused, run, succeed
from torch import Tensor

from gradcodec import cli, hub, metrics
from gradcodec.codec import Codec
from gradcodec.registry import UNTRAINED, make_codec
from gradcodec.tgap import SnapshotStore

BUNDLED = "stdlib-llama-lora-r8-32x"
LAYERS = 12


def layered(seed: int = 0) -> dict[str, Tensor]:
    """Twelve layers of two matrices and a vector, and a head."""
    generator = torch.Generator().manual_seed(seed)
    update = {}
    for i in range(LAYERS):
        update[f"net.{i}.up.weight"] = torch.randn(12, 6, generator=generator)
        update[f"net.{i}.down.weight"] = torch.randn(6, 12, generator=generator)
        update[f"net.{i}.norm.weight"] = torch.randn(6, generator=generator)
    update["head.weight"] = torch.randn(5, 6, generator=generator)
    return update


def written(path: Path, update: dict[str, Tensor]) -> str:
    save_file({n: t.contiguous() for n, t in update.items()}, path)
    return str(path)


def row(out: str, label: str) -> str:
    (found,) = re.findall(rf"^{label} {{2,}}(.*)$", out, re.MULTILINE)
    return found


def chart(out: str, title: str) -> dict[str, list[str]]:
    """Columns of a chart's rows by name; bars and marks left out."""
    (text,) = [block for block in out.split("\n\n") if block.startswith(title)]
    rows = {}
    for line in text.splitlines()[4:]:
        name, *rest = line.split()
        rows[name] = [r for r in rest if not set(r) & set("▏▎▍▌▋▊▉█▁▂▃▄▅▆▇·")]
    return rows


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNTRAINED)
def test_the_error_and_bytes_of_an_untrained_codec_are_what_it_does(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    update = layered()
    out = succeed(capsys, "inspect", name, "--update", written(tmp_path / "u.safetensors", update))
    made = make_codec(name)
    # In the order of the file, which sorts names; layer 9 comes before layer 10.
    order = sorted(update, key=lambda n: [p.zfill(3) if p.isdigit() else p for p in n.split(".")])
    payload = made.encoder.encode({n: update[n] for n in order})
    error = metrics.rse(update, made.decoder.decode(payload))
    assert row(out, "sent").startswith(f"{len(payload.to_bytes()):,} bytes")
    assert row(out, "error").startswith(f"{error:.3g} of the energy")


def test_the_errors_of_a_folder_are_per_kind(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made, update = codec(), {t.name: torch.randn(t.shape) for t in SPEC}
    made.save_pretrained(tmp_path / "mine")
    file = written(tmp_path / "u.safetensors", update)
    out = succeed(capsys, "inspect", str(tmp_path / "mine"), "--update", file)
    decoded = made.decoder.decode(made.encoder.encode(update))
    rows = chart(out, "what is lost of the update")
    assert set(rows) == {"w", "v"}
    for name, columns in rows.items():
        error = metrics.rse({name: update[name]}, {name: decoded[name]})
        assert columns[2] == columns[3] == f"{error:.3g}"
    through = made.from_code(made.to_code(update))
    assert row(out, "before packing").startswith(f"{metrics.rse(update, through):.3g} ")


def test_the_allocation_of_a_bundled_codec_is_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    out = succeed(capsys, "inspect", BUNDLED)
    rows = chart(out, "allocation of the code")
    made = Codec.from_pretrained(BUNDLED)
    assert sum(int(columns[2].replace(",", "")) for columns in rows.values()) == made.code_numel()
    assert sum(float(columns[4].rstrip("%")) for columns in rows.values()) == pytest.approx(
        100, abs=0.05 * len(rows)
    )


def test_the_spectrum_of_a_matrix_of_rank_one_is_one_direction(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    update = {"a": torch.outer(torch.randn(6), torch.randn(9)), "b": torch.eye(8)}
    out = succeed(capsys, "inspect", written(tmp_path / "u.safetensors", update))
    rows = chart(out, "singular spectrum of the update")
    assert rows["a"] == ["1", "6", "1.0", "1"]
    assert rows["b"] == ["1", "8", "8.0", "8"]


def test_layers_are_one_line_unless_every_tensor_is_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = written(tmp_path / "u.safetensors", layered())
    out = succeed(capsys, "inspect", "int4", "--update", file)
    rows = chart(out, "what is lost of the update")
    assert {n: columns[0] for n, columns in rows.items()} == {
        "head": "1",
        "net.*.up": "12",
        "net.*.down": "12",
        "net.*.norm": "12",
    }
    out = succeed(capsys, "inspect", "int4", "--update", file, "--tensors")
    names = list(chart(out, "what is lost of the update"))
    assert len(names) == 3 * LAYERS + 1
    assert [n for n in names if "up" in n] == [f"net.{i}.up" for i in range(LAYERS)]


def test_a_snapshot_of_a_recorder_is_an_update(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    SnapshotStore(tmp_path).add(layered())
    out = succeed(capsys, "inspect", str(tmp_path / "000000000.safetensors"))
    assert row(out, "update").startswith("37 tensors, ")


# -- payloads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4", "rotsign", BUNDLED])
def test_a_payload_of_a_known_codec_is_decoded(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    known = Codec.from_pretrained(name) if name in hub.bundled() else make_codec(name)
    spec = known.spec
    update = layered() if spec is None else {t.name: torch.randn(t.shape) for t in spec}
    path = tmp_path / "payload.bin"
    payload = known.encoder.encode(update)
    path.write_bytes(payload.to_bytes())
    out = succeed(capsys, "inspect", str(path))
    assert row(out, "written by") == name
    assert "singular spectrum of the decoded update" in out
    out = succeed(
        capsys, "inspect", str(path), "--update", written(tmp_path / "u.safetensors", update)
    )
    error = metrics.rse(update, known.decoder.decode(payload))
    assert row(out, "error").startswith(f"{error:.3g} of the energy")


def test_a_bound_payload_of_an_untrained_codec_is_known_with_its_update(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    update = {t.name: torch.randn(t.shape) for t in SPEC}
    path, file = tmp_path / "payload.bin", tmp_path / "u.safetensors"
    written(file, update)
    order = {n: update[n] for n in sorted(update)}
    bound = make_codec("int8").bind(type(SPEC).of(order))
    path.write_bytes(bound.encoder.encode(order).to_bytes())
    assert "not decoded" in row(succeed(capsys, "inspect", str(path)), "values")
    out = succeed(capsys, "inspect", str(path), "--update", str(file))
    assert row(out, "written by") == "int8"


def test_a_payload_of_a_folder_is_decoded_with_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made, path = codec(), tmp_path / "payload.bin"
    made.save_pretrained(tmp_path / "mine")
    path.write_bytes(made.encoder.encode({t.name: torch.ones(t.shape) for t in SPEC}).to_bytes())
    assert "not decoded" in row(succeed(capsys, "inspect", str(path)), "values")
    out = succeed(capsys, "inspect", str(path), "--codec", str(tmp_path / "mine"))
    assert "allocation of the code" in out


# -- pictures --------------------------------------------------------------------------------------


def size_of_png(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def test_plot_writes_a_png_and_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "new" / "out.png"
    file = written(tmp_path / "u.safetensors", layered())
    plain = succeed(capsys, "inspect", "int4", "--update", file)
    out = succeed(capsys, "inspect", "int4", "--update", file, "--plot", str(picture))
    assert row(out, "picture") == str(picture)
    assert out.partition("\n\n")[2] == plain.partition("\n\n")[2]  # the text is drawn as well
    assert size_of_png(picture)[0] == 1200
    assert [p.name for p in picture.parent.iterdir()] == ["out.png"]


def test_a_codec_without_an_update_is_drawn(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    succeed(capsys, "inspect", BUNDLED, "--plot", str(tmp_path / "a.png"))
    assert size_of_png(tmp_path / "a.png")[1] > 500


def test_zeros_that_do_not_stay_zeros_are_drawn(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    update = {"l.0.w": torch.zeros(4, 4), "l.1.w": torch.randn(4, 4), "b $x$": torch.zeros(3)}
    file = written(tmp_path / "u.safetensors", update)
    out = succeed(capsys, "inspect", "sign", "--update", file, "--plot", str(tmp_path / "a.png"))
    assert "∞" in out
    assert "b $x$" in out


def test_without_matplotlib_the_error_names_the_extra(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    err = refused(capsys, "inspect", BUNDLED, "--plot", str(tmp_path / "a.png"))
    assert (
        err == "gradcodec: ConfigError: plots need matplotlib: pip install 'gradcodec[examples]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_text_needs_no_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = builtins.__import__

    def guarded(name: str, *rest: Any, **more: Any) -> Any:
        assert name.partition(".")[0] != "matplotlib"
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", guarded)
    assert "█" in succeed(capsys, "inspect", BUNDLED)


# -- errors ----------------------------------------------------------------------------------------


def test_bad_input_is_a_named_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    good = written(tmp_path / "good.safetensors", layered())
    nan = written(tmp_path / "nan.safetensors", {"w": torch.tensor([[1.0, float("nan")]] * 2)})
    empty = written(tmp_path / "empty.safetensors", {})
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"no such thing")
    codec().save_pretrained(tmp_path / "mine")
    mine = str(tmp_path / "mine")
    sent = tmp_path / "payload.bin"
    sent.write_bytes(codec().encoder.encode({t.name: torch.ones(t.shape) for t in SPEC}).to_bytes())
    png = str(tmp_path / "a.png")
    cases = {
        ("int4", "--update", str(tmp_path / "missing")): "ConfigError: .*missing cannot be read",
        ("int4", "--update", str(junk)): "UpdateError: .*expected a safetensors file",
        ("int4", "--update", empty): "UpdateError: .*got none",
        ("int4", "--update", nan): "NonFiniteError: .*'w'",
        ("fp32", "--update", nan): "NonFiniteError: .*'w'",
        (nan,): "NonFiniteError: .*'w'",
        (str(junk),): "UpdateError: ",
        (mine, "--update", good): "UpdateError: names differ",
        ("resnet3", "--update", good): "ConfigError: .*an architecture",
        (good, "--update", good): "ConfigError: .*an update itself",
        ("int4", "--codec", "int8"): "ConfigError: --codec says what wrote a payload",
        (str(sent), "--update", good): "ConfigError: .*is not bundled.*--codec",
        (str(sent), "--codec", "int8"): "CodecMismatchError: ",
        (str(sent), "--codec", mine, "--update", good): "UpdateError: names differ",
        ("int4", "--plot", png): "ConfigError: nothing to draw",
        ("resnet3", "--plot", png): "ConfigError: nothing to draw",
        (BUNDLED, "--plot", str(tmp_path / "a.jpg")): "ConfigError: .*ends in .png",
        (BUNDLED, "--plot", mine + "/config.json/a.png"): "NotADirectoryError|FileExistsError",
    }
    for arguments, error in cases.items():
        err = refused(capsys, "inspect", *arguments)
        assert re.match(f"gradcodec: ({error})", err), (arguments, err)
    assert not Path(png).exists()


def test_names_cannot_command_the_terminal(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    update = {"evil\x1b[2J\n": torch.randn(4, 4), "w" * 300: torch.randn(4, 4)}
    out = succeed(
        capsys, "inspect", "int4", "--update", written(tmp_path / "u.safetensors", update)
    )
    assert "\x1b" not in out
    assert max(len(line) for line in out.splitlines()) < 200


def test_a_terminal_of_another_encoding_gets_the_numbers(tmp_path: Path) -> None:
    done = run(tmp_path, "inspect", BUNDLED, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "allocation of the code" in done.stdout


def test_help_names_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--help"])
    out = capsys.readouterr().out
    assert all(option in out for option in ("--update", "--plot", "--tensors", "--codec"))


@pytest.mark.parametrize("which", UPDATES)
@pytest.mark.parametrize("name", ["fp32", "rotsign"])
def test_payloads_of_every_kind_of_update_are_shown(
    which: str, name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    update = UPDATES[which]()
    if name != "fp32" and not all(t.is_floating_point() for t in update.values()):
        pytest.skip("integers travel bit for bit only")
    path = tmp_path / "payload.bin"
    path.write_bytes(make_codec(name).encoder.encode(update).to_bytes())
    out = succeed(capsys, "inspect", str(path), "--tensors")
    shown = chart(out, "allocation of the code")
    assert len(shown) == sum(t.numel() > 0 for t in update.values())
