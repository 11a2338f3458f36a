"""A method is a row of its table: nothing outside the rows' own modules knows one by name."""

import ast
from collections.abc import Iterable
from pathlib import Path

from merge3.kernels import RULES
from merge3.methods import METHODS

ROOT = Path(__file__).parents[2]
FAMILIES = ("averages", "task_arithmetic", "spherical", "rules", "spectral", "doge")
ROWS = {f"merge3/methods/{family}.py" for family in FAMILIES}
# (file, words, why they are no method's name there)
OTHER_MEANINGS = [
    ("merge3/kernels.py", RULES, "elementwise rules of the kernels, which know no methods"),
    ("merge3/reference.py", RULES, "the same rules, in their oracle"),
    ("merge3/client/demo.py", ("task_arithmetic",), "the configuration that the demo writes, as a user would"),
    ("merge3/world/searched.py", ("ties",), "the configuration of the tests' world, as a user would write it"),
]


def modules() -> dict[str, str]:
    """Path from the root -> text of every module that people wrote."""
    found = {}
    for package in ("merge3", "server"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "_pb2" not in path.name:
                found[path.relative_to(ROOT).as_posix()] = path.read_text()
    return found


def constants(text: str) -> list[tuple[int, str]]:
    """(line, value) of every string constant, docstrings left out."""
    tree = ast.parse(text)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings.add(first.value)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
            found.append((node.lineno, node.value))
    return found


def places(texts: dict[str, str], names: Iterable[str]) -> list[tuple[str, int, str]]:
    """(file, line, name) wherever a string constant is one of the names."""
    found = []
    for file, text in texts.items():
        found += [(file, line, value) for line, value in constants(text) if value in names]
    return found


def test_no_method_is_named_outside_its_row():
    other = {file: words for file, words, _ in OTHER_MEANINGS}
    elsewhere = []
    for file, line, name in places(modules(), METHODS):
        if file not in ROWS and name not in other.get(file, ()):
            elsewhere.append(f"{file}:{line}: {name!r}")
    lines = "\n".join(elsewhere)
    assert not elsewhere, f"{len(elsewhere)} places name a method that only its row should:\n{lines}"


def test_every_exception_is_still_needed():
    named = {(file, name) for file, _, name in places(modules(), METHODS)}
    for file, words, why in OTHER_MEANINGS:
        assert any((file, word) in named for word in words), f"{file}: none of {words} ({why})"


def test_every_method_is_named_by_its_row():
    assert {name for file, _, name in places(modules(), METHODS) if file in ROWS} == set(METHODS)


def test_a_place_is_a_constant_and_no_docstring():
    text = '"""ties"""\ndef f(x):\n    """ties"""\n    return x == "ties" or x == "bowties" or "a ties b"\n'
    assert places({"a.py": text}, METHODS) == [("a.py", 4, "ties")]
