"""Text files are UTF-8 wherever they are read or written, whatever the locale says."""

import ast

from tests.house.test_sizes import ROOT, modules


def without_encoding(source):
    """Lines that open a text file in the locale's encoding. What has two arguments, name and text, is a writer's own
    `write_text`; what opens something else than a file has no mode and no plain `open`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(given.arg == "encoding" for given in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        said = [*node.args, *(given.value for given in node.keywords if given.arg == "mode")]
        mode = next((arg.value for arg in said if isinstance(arg, ast.Constant) and str(arg.value)[:1] in "rwax"), "r")
        plain = isinstance(node.func, ast.Name) and name in ("open", "fdopen")
        if (name == "read_text" or (name == "write_text" and len(node.args) < 2)) or (plain and "b" not in mode):
            yield node.lineno


def test_every_text_file_is_opened_as_utf_8():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules()
        for line in without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert not found, "no encoding, so the locale's:\n" + "\n".join(found)


def test_what_is_found():
    source = """
open(file)
open(file, "w")
open(file, "rb")
open(file, encoding="utf-8")
file.read_text()
file.write_text(text)
file.write_text(text, encoding="utf-8")
writer.write_text("config.json", text)
Pool.open(base, models)
"""
    assert list(without_encoding(source)) == [2, 3, 6, 7]
