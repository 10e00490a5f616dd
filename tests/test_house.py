"""The order of the house: who may import whom. Read from the files, nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ebu_optim"
MODULES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
    for p in PACKAGE.rglob("*.py")
}
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs when a module is imported."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for part in ("body", "orelse", "handlers", "finalbody"):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                inner = getattr(node, part, [])
                yield from statements([n for n in inner if isinstance(n, ast.stmt)])


def absolute(node: ast.ImportFrom, name: str) -> str:
    """The module that a from-import names, seen from the module `name`."""
    if not node.level:
        return node.module or ""
    parts = name.split(".")
    is_package = MODULES[name].name == "__init__.py"
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports(name: str) -> set[str]:
    """The modules of the package that importing `name` imports."""
    found = set()
    for node in statements(ast.parse(MODULES[name].read_text()).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, name)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in MODULES else module)
    return {m for m in found if m in MODULES and m != name}


def test_there_is_no_circle():
    graph = {name: imports(name) for name in MODULES}
    assert (
        "ebu_optim.kernels.reference"
        in graph["ebu_optim.optim.ebu"] | graph["ebu_optim.optim._selection"]
    )
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("name", sorted(MODULES))
def test_what_is_private_stays_behind_its_door(name):
    room = name.split(".")[1:2]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = absolute(node, name).split(".")
        if module[0] != "ebu_optim" or module[1:2] == room or len(module) < 2:
            continue
        inside = [*module[2:], *(alias.name for alias in node.names)]
        private = [part for part in inside if part.startswith("_") and part != "__version__"]
        assert not private, f"{name} reaches for {private} of {'.'.join(module)}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: str(p.relative_to(ROOT / "examples")))
def test_an_example_uses_what_is_public(path):
    text = path.read_text()
    assert "sys.path" not in text
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ebu_optim"):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not [n for n in names if n.startswith("_") and not n.startswith("__")]


@pytest.mark.parametrize("path", [*MODULES.values(), *EXAMPLES], ids=lambda p: p.stem)
def test_every_option_says_what_it_is_in_sentences(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)):
            continue
        if ast.unparse(node.value.func) != "option":
            continue
        said = next((k.value for k in node.value.keywords if k.arg == "help"), None)
        assert said is not None, f"{ast.unparse(node.target)} has no help"
        if isinstance(said, ast.Constant):  # else it is put together
            assert said.value.endswith((".", "...")), f"{said.value!r} is no sentence"


def test_ruff_lays_out_all_code():
    files = [*MODULES.values(), *EXAMPLES, *(ROOT / "tests").rglob("*.py")]
    mark = "# fmt" + ":"
    assert not [str(f) for f in files if mark in f.read_text(encoding="utf-8")]
