"""A way out that a message names exists: extras, packages, options, functions, environment."""

import argparse
import ast
import builtins
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed
import torch.distributed.fsdp
import torch.distributed.tensor
from torch.distributed.device_mesh import DeviceMesh

from gradcodec import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SOURCES = {p: ast.parse(p.read_text()) for p in sorted((ROOT / "gradcodec").rglob("*.py"))}


def texts(node: ast.AST) -> str:
    """The constant text of an expression; ``?`` for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(v) if isinstance(v, ast.Constant) else "?" for v in node.values)
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return " ".join(texts(child) for child in ast.iter_child_nodes(node))


def docstrings(tree: ast.Module) -> set[int]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    bodies = [n.body for n in ast.walk(tree) if isinstance(n, kinds)]
    return {id(b[0].value) for b in bodies if b and isinstance(b[0], ast.Expr)}


def messages() -> Iterator[tuple[str, str]]:
    """Every string of the library that is not a docstring, and where it is."""
    for path, tree in SOURCES.items():
        skipped = docstrings(tree)
        inner = {
            id(part)
            for node in ast.walk(tree)
            if isinstance(node, ast.JoinedStr)
            for part in node.values
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in skipped | inner:
                text = texts(node)
                if " " in text:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", text


MESSAGES = list(messages())


def found(pattern: str) -> list[tuple[str, str]]:
    """What a pattern's group matches in all messages, and where."""
    return [(m.group(1), at) for at, text in MESSAGES for m in re.finditer(pattern, text)]


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def defined() -> set[str]:
    """Names of everything that the library, torch and Python itself offer."""
    names = {
        node.name
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    places = (
        builtins,
        dict,
        torch,
        torch.distributed,
        torch.distributed.fsdp,
        torch.distributed.fsdp.FSDPModule,
        torch.distributed.device_mesh,
        torch.distributed.tensor,
        torch.distributed.tensor.DTensor,
        DeviceMesh,
        torch.nn.parallel,
        torch.nn.Module,
        torch.Tensor,
    )
    return names.union(*map(dir, places))


def test_there_are_messages_to_look_at() -> None:
    assert len(MESSAGES) > 300


def test_extras_exist_and_hold_what_the_message_is_about() -> None:
    named = found(r"pip install 'gradcodec\[(\w+)\]'")
    assert len(named) >= 3
    assert [n for n in named if n[0] not in EXTRAS] == []
    for package, extra in (("tqdm", "examples"), ("matplotlib", "examples"), ("triton", "gpu")):
        assert any(row.startswith(package) for row in EXTRAS[extra])


def test_packages_to_install_are_ours_to_name() -> None:
    rows = [*PROJECT["dependencies"], *(r for rows in EXTRAS.values() for r in rows)]
    known = {re.split(r"[^\w-]", row)[0] for row in rows}
    named = found(r"pip install ([a-z][\w -]*)")
    assert named
    assert [n for n in named if not set(n[0].split()) <= known] == []


def test_options_exist() -> None:
    options = {o for p in parsers(cli._parser()) for a in p._actions for o in a.option_strings}
    named = found(r"(?<![\w-])(--[a-z][a-z-]*[a-z])")
    assert {"--resume", "--out"} <= {n for n, _ in named}
    ours = [n for n in named if n[0] not in ("--no-deps",)]
    assert [n for n in ours if n[0] not in options] == []


def test_functions_exist() -> None:
    named = found(r"\b([a-z][a-z_]{3,})\((?=[\w.,= )])")
    assert len(named) > 5
    names = defined()
    assert [n for n in named if n[0] not in names] == []
