"""The notebook is executed as a reader would, and what it says is what comes out."""

import os
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PATH = ROOT / "examples" / "notebook.ipynb"
CODECS = ("int4", "sign-rotated", "rotsign", "stdlib-llama-lora-r8-7x")

nbformat = pytest.importorskip("nbformat", reason="needs: pip install 'gradcodec[dev]'")
nbclient = pytest.importorskip("nbclient", reason="needs: pip install 'gradcodec[dev]'")
for package in ("ipykernel", "matplotlib", "peft", "transformers"):
    pytest.importorskip(package, reason="needs: pip install 'gradcodec[dev]'")


def outputs(notebook: Any) -> list[Any]:
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def printed(notebook: Any) -> str:
    return "".join(o.text for o in outputs(notebook) if o.get("name") == "stdout")


def table(notebook: Any) -> dict[str, list[float]]:
    """Bytes, times less, cosine and error of each codec."""
    text, number = printed(notebook), r" +([\d.,]+)x?"
    return {
        name: [float(x.replace(",", "")) for x in found[0]]
        for name in CODECS
        if (found := re.findall(rf"^{name}{number}{number}{number}{number}$", text, re.MULTILINE))
    }


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after all its cells ran in a kernel of this interpreter."""
    notebook = nbformat.read(PATH, as_version=4)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    folder = tmp_path_factory.mktemp("reader")
    client = nbclient.NotebookClient(
        notebook,
        timeout=500,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    return client.execute(env=env)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_codec_keeps_what_the_text_says(executed: Any) -> None:
    rows = table(executed)
    assert set(rows) == set(CODECS)
    columns = zip(*rows.values(), strict=True)
    size, times, cosine, error = (dict(zip(rows, column, strict=True)) for column in columns)
    subspace = CODECS[-1]
    assert 7 < times["int4"] < 9
    assert cosine["int4"] > 0.97
    assert cosine["sign-rotated"] == pytest.approx(0.8, abs=0.02)
    assert cosine["rotsign"] == pytest.approx(0.8, abs=0.02)
    assert error["rotsign"] > error["sign-rotated"] + 0.1
    assert cosine[subspace] == pytest.approx(cosine["sign-rotated"], abs=0.06)
    assert size[subspace] < size["sign-rotated"] / 3.5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_draws_one_picture(executed: Any) -> None:
    assert ["image/png" in o.data for o in outputs(executed) if "data" in o] == [True]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_ends_with_what_inspect_says(executed: Any) -> None:
    assert "what is lost of the update, model.layers" in printed(executed)


def test_what_is_committed_is_small_and_names_no_machine() -> None:
    text = PATH.read_text()
    assert len(text) < 300_000
    assert not re.search(r"[\"' (]/(home|root|tmp|usr|work|Users|var|opt)/", text)
    assert not any(o.get("name") == "stderr" for o in outputs(nbformat.read(PATH, as_version=4)))


def test_both_pages_lead_to_it() -> None:
    assert "(examples/notebook.ipynb)" in (ROOT / "README.md").read_text()
    assert "(notebook.ipynb)" in (ROOT / "examples" / "README.md").read_text()
