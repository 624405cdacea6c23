"""What a user installs is what is in the tree."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import gradcodec

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {"gradcodec": ROOT / "gradcodec", "gradcodec_kernels": ROOT / "kernels/gradcodec_kernels"}
PAGES = ("README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "WIRE.md")
BASE_MODEL = "gradcodec/assets/stdlib-llama/"


def packages_of_tree() -> set[str]:
    """Import names of the folders that hold an ``__init__.py``."""
    found = set()
    for name, folder in SOURCES.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join((name, *init.parent.relative_to(folder).parts)))
    return found


def test_kernels_is_a_folder_and_not_a_package() -> None:
    # With an __init__.py it would shadow Hugging Face's `kernels`, which transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_listed_packages_are_those_of_the_tree() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert listed == sorted(listed)
    assert set(listed) == packages_of_tree()


def test_every_module_is_in_a_package() -> None:
    for folder in SOURCES.values():
        for path in folder.rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), f"{path.relative_to(ROOT)}: no package"


def test_type_information_is_shipped() -> None:
    assert (ROOT / "gradcodec" / "py.typed").exists()


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist, built from a copy so that no earlier build folder can help, and its wheel."""
    copy = tmp_path_factory.mktemp("source")
    skip = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    for name in ("gradcodec", "kernels", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", *PAGES):
        shutil.copy(ROOT / name, copy)
    # Without an argument for either, `build` makes the wheel from the sdist.
    run(sys.executable, "-m", "build", "--no-isolation", str(copy))
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    """The wheel that the sdist gives."""
    (built,) = dist.glob("*.whl")
    return built


def shipped() -> set[str]:
    """What an installed package consists of, apart from the C library."""
    found = set()
    for name, folder in SOURCES.items():
        for path in folder.rglob("*"):
            wanted = path.suffix == ".py" or path.name == "py.typed" or "assets" in path.parts
            if path.is_file() and wanted:
                found.add(f"{name}/{path.relative_to(folder).as_posix()}")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment that holds the wheel."""
    home = tmp_path_factory.mktemp("fresh")
    venv.create(home, with_pip=True)
    windows = os.name == "nt"
    python = home / ("Scripts/python.exe" if windows else "bin/python")
    run(str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel))
    # The dependencies are borrowed from this environment, after the install and behind it on the
    # path, rather than downloaded a second time. Editable installs are not borrowed: python reads
    # .pth files only in an environment's own folder.
    libs = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    lent = sysconfig.get_path("purelib")
    Path(libs, "zz_dependencies.pth").write_text(lent + "\n")
    return python


@pytest.mark.slow
def test_wheel_holds_the_tree(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    libraries = {n for n in names if n.startswith("gradcodec/native/_library.")}
    assert names - libraries == shipped()
    # With a compiler the C library is inside, and the file's name says for which platform.
    compiler = shutil.which(sysconfig.get_config_var("CC").split()[0])
    assert len(libraries) == (1 if compiler else 0)
    assert ("-none-any.whl" in wheel.name) == (not libraries)


@pytest.mark.slow
def test_wheel_holds_the_licence_and_the_readme(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = f"gradcodec-{wheel.name.split('-')[1]}.dist-info"
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = archive.read(f"{info}/METADATA").decode()
    assert metadata.endswith((ROOT / "README.md").read_text())


@pytest.mark.slow
def test_wheel_weighs_little_beside_the_base_model(wheel: Path) -> None:
    # CONTRIBUTING.md says what the base model is for, and what else may weigh.
    with zipfile.ZipFile(wheel) as archive:
        rest = [i for i in archive.infolist() if not i.filename.startswith(BASE_MODEL)]
    assert sum(i.compress_size for i in rest) < 6_000_000


@pytest.mark.slow
def test_sdist_holds_what_is_built_and_nothing_else(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    sources = ROOT / "gradcodec" / "native" / "src"
    code = {n.replace("gradcodec_kernels/", "kernels/gradcodec_kernels/") for n in shipped()}
    code |= {f"gradcodec/native/src/{p.name}" for p in sources.iterdir()}
    made = {"PKG-INFO", "setup.cfg"} | {n for n in names if n.startswith("gradcodec.egg-info/")}
    assert names - made == code | {"pyproject.toml", "setup.py", "MANIFEST.in", *PAGES}


@pytest.mark.slow
def test_every_module_of_the_wheel_imports(wheel: Path, installed: Path, tmp_path: Path) -> None:
    names = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".py")]
    modules = sorted(
        n.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for n in names
    )
    lines = [
        "import importlib, pathlib, sys",
        "def load(name):",
        "    try:",
        "        importlib.import_module(name)",
        "    except ModuleNotFoundError as err:  # an adapter may lack its framework, nothing else",
        "        if not name.startswith('gradcodec.integrations.') or 'gradcodec' in err.name:",
        "            raise",
    ]
    lines += [f"load({m!r})" for m in modules]
    lines += [
        "for name, module in list(sys.modules.items()):",
        "    if name.split('.')[0] in ('gradcodec', 'gradcodec_kernels'):",
        "        assert pathlib.Path(module.__file__).is_relative_to(sys.prefix), module.__file__",
    ]
    run(str(installed), "-I", "-c", "\n".join(lines), cwd=tmp_path)


@pytest.mark.slow
def test_version_is_the_packages(wheel: Path) -> None:
    assert wheel.name.split("-")[1] == gradcodec.__version__


def test_citation_and_changelog_name_the_version() -> None:
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert cited[1] == gradcodec.__version__
    newest = re.search(r"^## (\d[\d.]*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == gradcodec.__version__


@pytest.mark.slow
@pytest.mark.parametrize("command", PROJECT["project"]["scripts"])
def test_command_is_installed(command: str, installed: Path, tmp_path: Path) -> None:
    assert "usage" in run(str(installed.with_name(command)), "--help", cwd=tmp_path).lower()


def run(*command: str, cwd: Path | None = None) -> str:
    """Output of a command; its errors, too, when it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
