"""The architecture as a law: a module imports only what is listed before it (docs/architecture.md).

Imports inside functions count too: they change when a module loads, not what it knows.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Lowest first. A name stands for the module or the package of that name; modules of one package
#: may import each other.
FLOORS: dict[int, tuple[str, ...]] = {
    0: (
        "gradcodec._version",
        "gradcodec.errors",
        "gradcodec.files",
        "gradcodec.encodable",
        "gradcodec.names",
        "gradcodec.types",
    ),
    1: (
        "gradcodec.parameters",
        "gradcodec.layout",
        "gradcodec.settings",
        "gradcodec.wire",
        "gradcodec.reference",
        "gradcodec.native",
        "gradcodec_kernels",
        "gradcodec.ops",
        "gradcodec.hub",
    ),
    2: (
        "gradcodec.packers",
        "gradcodec.transforms",
        "gradcodec.pipeline",
        "gradcodec.claims",
        "gradcodec.codec",
        "gradcodec.codecs",
        "gradcodec.chain",
        "gradcodec.per_tensor",
        "gradcodec.registry",
        "gradcodec.metrics",
    ),
    3: (
        "gradcodec.representation",
        "gradcodec.tgap",
        "gradcodec.anchor",
        "gradcodec.faf",
        "gradcodec.describe",
    ),
    4: ("gradcodec.privacy", "gradcodec.federated", "gradcodec.distributed"),
    5: ("gradcodec._public", "gradcodec"),  # the roof: public names only
    6: ("gradcodec.recipes", "gradcodec.integrations", "gradcodec.picture", "gradcodec.cli"),
}
ORDER = [name for names in FLOORS.values() for name in names]

#: Floors inside a package, in the same order; its own ``__init__`` is the roof.
INSIDE: dict[str, dict[str, tuple[str, ...]]] = {
    "gradcodec.distributed": {
        "a": ("meter", "shards", "checks", "compression"),
        "b": ("lowrank", "coding"),
        "c": ("residuals", "exchange"),
        "d": ("plan",),
        "e": ("trial", "wrappers"),
        "f": ("hook", "compress"),
        "g": (
            *("fragments", "anchors", "flights", "local_parts", "catch_up"),
            *("local_state", "local_steps"),
        ),
    }
}


def modules() -> dict[str, Path]:
    """Every module of the tree by its import name."""
    found = {}
    for base in (ROOT, ROOT / "kernels"):
        for package in ("gradcodec", "gradcodec_kernels"):
            for path in sorted((base / package).rglob("*.py")):
                parts = path.relative_to(base).with_suffix("").parts
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def place(module: str) -> int | None:
    """Position of a module in ``ORDER``: its own entry or its package's, never the roof's."""
    for position, name in enumerate(ORDER):
        if module == name or (name != "gradcodec" and module.startswith(name + ".")):
            return position
    return None


def imports(module: str, source: str) -> Iterator[str]:
    """Modules of ours that a source imports, at any depth of its code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            origin = node.module or ""
            below = [f"{origin}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else origin for name in below]
        else:
            continue
        yield from (n for n in names if n.split(".")[0] in ("gradcodec", "gradcodec_kernels"))


def violations(module: str, source: str) -> list[str]:
    """What a module imports although it stands at the same place or after it."""
    mine = place(module)
    assert mine is not None
    bad = []
    for name in imports(module, source):
        theirs = place(name)
        assert theirs is not None, f"{module} imports {name}, which is in no floor"
        same_package = theirs == mine and ORDER[mine] != "gradcodec"
        if theirs > mine or (theirs == mine and not same_package):
            bad.append(f"{module} imports {name}")
    return bad


def test_every_module_has_a_floor() -> None:
    assert [m for m in MODULES if place(m) is None] == []


def test_the_picture_shows_these_floors() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = dict(re.findall(r"^\| (\d) \| (.*?) \|", page, re.MULTILINE))
    drawn = {int(floor): tuple(re.findall(r"`(\w+)`", names)) for floor, names in rows.items()}
    assert drawn == {f: tuple(n.removeprefix("gradcodec.") for n in ns) for f, ns in FLOORS.items()}


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_lower_floors(module: str) -> None:
    assert violations(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize("package", INSIDE)
def test_modules_inside_a_package_import_only_lower_floors(package: str) -> None:
    order = [f"{package}.{name}" for names in INSIDE[package].values() for name in names]

    def floor(module: str) -> int | None:
        """The position of a module of this package."""
        found = [i for i, n in enumerate(order) if module == n or module.startswith(n + ".")]
        return found[0] if found else None

    bad = []
    for module, path in MODULES.items():
        if not module.startswith(package + "."):
            continue
        mine = floor(module)
        assert mine is not None, f"{module} is on no floor of {package}"
        for name in imports(module, path.read_text()):
            theirs = floor(name) if name.startswith(package) else -1
            if theirs is None or theirs > mine:
                bad.append(f"{module} imports {name}")
    assert bad == []


def test_inside_floors_are_drawn() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for floors in INSIDE.values():
        rows = dict(re.findall(r"^\| ([a-z]) \| (.*?) \|", page, re.MULTILINE))
        drawn = {floor: tuple(re.findall(r"`(\w+)`", names)) for floor, names in rows.items()}
        assert drawn == floors


KINDS = ("chain", "codecs", "packers", "per_tensor", "pipeline", "registry", "transforms")


def test_one_module_of_distributed_knows_kinds_of_codecs() -> None:
    """All others know the class ``Codec`` alone, and what ``coding`` makes of one."""
    bad = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        if module.startswith("gradcodec.distributed.") and not module.endswith(".coding")
        for name in imports(module, path.read_text())
        if name.split(".")[1] in KINDS
    ]
    assert bad == []


@pytest.mark.parametrize("module", MODULES)
def test_only_ops_imports_kernels(module: str) -> None:
    if module.startswith(("gradcodec.ops", "gradcodec_kernels")):
        return
    named = imports(module, MODULES[module].read_text())
    assert [n for n in named if n.split(".")[0] == "gradcodec_kernels"] == []


def test_kernels_know_nothing_of_gradcodec() -> None:
    for module, path in MODULES.items():
        if module.startswith("gradcodec_kernels"):
            assert [
                n for n in imports(module, path.read_text()) if n.startswith("gradcodec.")
            ] == []


@pytest.mark.parametrize(
    "source",
    [
        "import gradcodec.packers.raw",
        "from gradcodec import packers",
        "from gradcodec.codec import Codec",
        "from gradcodec import Codec",
        "def f():\n    from gradcodec.packers import raw",
    ],
)
def test_the_law_sees_every_kind_of_import(source: str) -> None:
    assert len(violations("gradcodec.wire", source)) == 1
