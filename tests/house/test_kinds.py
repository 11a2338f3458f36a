"""An item kind is known by name in its own file and in the table's row, and nowhere else."""

import ast
from pathlib import Path

from merge3.tasks.kinds import KINDS

ROOT = Path(__file__).parents[2]
OWN = {f"merge3/tasks/{name}.py" for name in ("kinds", *KINDS)}
# (files, word, why it is not the kind there)
OTHER_MEANINGS = [
    ("server/service.py", "generate", "the host's method behind the RPC Generate"),
    ("server/generate.py", "generate", "the RPC Generate, as its messages name it"),
    ("merge3/world/*.py", "generate", "data: the demo's item files, as a user writes them"),
    ("merge3/client/surgery.py", "rank", "of an adapter, as result.json and a file's metadata name it"),
    ("merge3/learn/surgery_file.py", "rank", "of an adapter, as above"),
    ("merge3/methods/variants.py", "rank", "of a LoRA adapter, a parameter"),
    ("merge3/recipe/checks.py", "rank", "the same, where it stands by mistake"),
    ("merge3/variants/factors.py", "rank", "the same, as the parameter and variants.json name it"),
    ("merge3/world/strangers.py", "classify", "data: that world's item files, as a user writes them"),
    ("merge3/world/digits.py", "classify", "data: that world's item files, as a user writes them"),
]


def words(source, names):
    """(line, word) of the string constants equal to one of the names; docstrings and other bare texts are no code."""
    tree = ast.parse(source)
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in names and id(node) not in bare:
            yield node.lineno, node.value


def test_kinds_are_named_in_one_place():
    found = []
    for path in sorted([*ROOT.glob("merge3/**/*.py"), *ROOT.glob("server/**/*.py")]):
        file = path.relative_to(ROOT)
        if str(file) in OWN or path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
            continue
        for line, word in words(path.read_text(encoding="utf-8"), tuple(KINDS)):
            if not any(file.match(pattern) and word == other for pattern, other, _ in OTHER_MEANINGS):
                found.append(f"{file}:{line}: {word!r}")
    expected = f"the word is for {', '.join(sorted(OWN))}; a kind's functions are in its row"
    assert not found, f"item kinds named elsewhere ({expected}):\n" + "\n".join(found)


def test_every_kind_has_a_file_and_a_row():
    for name, kind in KINDS.items():
        assert (ROOT / f"merge3/tasks/{name}.py").is_file(), f"kind {name!r} has no file merge3/tasks/{name}.py"
        for function in (kind.answer, kind.request, *kind.metrics.values()):
            assert function.__module__ == f"merge3.tasks.{name}", f"{function} of kind {name!r} lies elsewhere"


def test_what_is_counted():
    code = ['"""choice"""', "def f(kind):", '    "choice"', '    a = {"choice": 1}', '    return kind == "choice" or a']
    assert list(words("\n".join(code), ("choice",))) == [(4, "choice"), (5, "choice")]
    assert not list(words('x = "choices"\ny = "no choice"\nz = 1\n', ("choice",)))
