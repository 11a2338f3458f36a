"""Modules are short, and what is public says what it is for."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_LINES = 320
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def modules():
    """Those of the packages; what protoc generates is nobody's to shorten."""
    for path in sorted([*ROOT.glob("merge3/**/*.py"), *ROOT.glob("server/**/*.py")]):
        if not path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
            yield path


def without_docstring(source):
    """(line, name) of public functions, and of public methods of public classes; what stands in a function is its."""
    waiting = [(ast.parse(source), "")]
    while waiting:
        scope, prefix = waiting.pop()
        for node in ast.iter_child_nodes(scope):
            name = getattr(node, "name", None)
            if not isinstance(name, str) or name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                waiting.append((node, f"{prefix}{name}."))
            elif isinstance(node, FUNCTIONS) and not ast.get_docstring(node):
                yield node.lineno, prefix + name


def test_modules_are_short():
    sizes = {path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    assert len(sizes) > 100, "the packages lie elsewhere"
    long = [
        f"{file}: {lines} lines; expected at most {MOST_LINES}" for file, lines in sizes.items() if lines > MOST_LINES
    ]
    assert not long, "to be split by what changes them:\n" + "\n".join(long)


def test_public_functions_have_docstrings():
    found = []
    for path in modules():
        for line, name in without_docstring(path.read_text(encoding="utf-8")):
            found.append(f"{path.relative_to(ROOT)}:{line}: {name} does not say what it is for")
    assert not found, "\n".join(found)


def test_what_is_counted():
    source = """
def told():
    "For something."
    def inner(): pass
def silent(): pass
def _own(): pass
class A:
    async def b(self): pass
    def c(self):
        "For something."
    class D:
        def e(self): pass
class _B:
    def f(self): pass
"""
    assert sorted(without_docstring(source)) == [(5, "silent"), (8, "A.b"), (12, "A.D.e")]
