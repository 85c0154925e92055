"""The architecture: modules in one order, imports only upwards in it, no circles, no module too long or too short."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import convsim_cli

PACKAGE = Path(__file__).parents[1] / "convsim_cli"
ORDER = (  # a module imports from its own line and the lines above it
    ("errors",),
    ("methods", "settings"),
    ("device", "precision"),
    ("similarity",),
    ("objectives",),
    ("kernels",),
    ("layers",),
    ("batch_norm",),
    ("measurement",),
    ("closed_forms", "minimize", "penalty", "rotation"),
    ("checkpoints",),
    ("inputs",),
    ("networks",),
    ("checkpoint_init", "checkpoint_measure"),
    ("training",),
    ("reproduction",),
    ("lightning", "plots"),
    ("cli", "__main__"),
)
LONGEST, SHORTEST = 600, 60  # lines of a module; a shorter one is imported by several others
MOST_MODULES, MOST_IMPORTS = 68, 300
PUBLIC = "convsim_cli"  # the package itself: a version number, and the public names on first use


def modules(package: Path) -> dict[str, Path]:
    """Every module of a package, by its dotted name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in known else node.module for name in names)


@cache
def graph(package: Path) -> dict[str, set[str]]:
    """What each module of a package imports from it."""
    known = modules(package)
    return {name: set(imports(path, known)) - {PUBLIC} for name, path in known.items() if name != PUBLIC}


def line(module: str) -> int:
    """The line of a module in `ORDER`."""
    top = module.split(".")[1]
    return next(number for number, names in enumerate(ORDER) if top in names)


def upward(package: Path) -> list[str]:
    """The imports of a package that go against `ORDER`."""
    return [
        f"{name} imports {imported}"
        for name, found in graph(package).items()
        for imported in sorted(found)
        if line(imported) > line(name)
    ]


def circle(package: Path) -> list[str]:
    """The modules of a circle of imports, empty where there is none."""
    try:
        TopologicalSorter(graph(package)).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_modules_import_only_from_the_lines_above_their_own() -> None:
    assert upward(PACKAGE) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(PACKAGE) == []


@pytest.mark.parametrize("inside", [True, False])
def test_an_upward_import_is_found_also_inside_a_function(inside: bool, tmp_path: Path) -> None:
    package = tmp_path / "convsim_cli"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "penalty.py").write_text("")
    statement = "from convsim_cli.penalty import x\n"
    (package / "similarity.py").write_text(f"def f():\n    {statement}" if inside else statement)
    assert upward(package) == ["convsim_cli.similarity imports convsim_cli.penalty"]


def test_a_circle_is_found(tmp_path: Path) -> None:
    package = tmp_path / "convsim_cli"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "minimize.py").write_text("import convsim_cli.penalty")
    (package / "penalty.py").write_text("from convsim_cli import minimize")
    assert set(circle(package)) == {"convsim_cli.minimize", "convsim_cli.penalty"}


def test_a_reader_can_hold_the_modules_and_their_imports() -> None:
    known = modules(PACKAGE)
    assert len(known) <= MOST_MODULES
    assert sum(len(set(imports(path, known)) - {name}) for name, path in known.items()) <= MOST_IMPORTS


@pytest.mark.parametrize("name", [name for name in modules(PACKAGE) if name != PUBLIC])
def test_a_module_is_neither_too_long_nor_too_short(name: str) -> None:
    path = modules(PACKAGE)[name]
    length = len(path.read_text().splitlines())
    assert line(name) >= 0
    assert length <= LONGEST
    importers = [other for other, found in graph(PACKAGE).items() if name in found]
    assert length >= SHORTEST or len(importers) != 1 or path.stem in ("__init__", "__main__")


def test_a_file_name_occurs_once_and_is_no_public_name() -> None:
    stems = Counter(path.stem for path in modules(PACKAGE).values() if path.stem not in ("__init__", "__main__"))
    assert [stem for stem, count in stems.items() if count > 1] == []
    assert not stems.keys() & set(convsim_cli.__all__)
    functions = {
        node.name
        for path in modules(PACKAGE).values()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert stems.keys() & functions == {"run"}  # `convsim_cli.cli.run`, and the folder of a run


def test_the_library_imports_nothing_of_the_command_line() -> None:
    outside = {name: found for name, found in graph(PACKAGE).items() if not name.startswith("convsim_cli.cli")}
    assert {n for n, found in outside.items() if any(i.startswith("convsim_cli.cli") for i in found)} == {
        "convsim_cli.__main__"
    }
