"""Puts generated tables into README.md and docs/*.md: benchmark results, and what METHODS says of the methods.

    python benchmarks/update_docs.py

A table stands between `<!-- table NAME -->` and `<!-- /table -->`, where everything is replaced.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

import yaml

from merge3.methods import LEARNED, METHODS, VARIANTS, ZIPPED
from merge3.methods.base import REQUIRED, Method, Parameter

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"<!-- table (\w+) -->\n(.*?)<!-- /table -->", re.S)


def documents() -> list[Path]:
    """Files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def tables() -> dict[str, str]:
    """Name -> Markdown: every file of results/ under its own name, `demo_short`, `gpu`, `methods`, `parameters`,
    `other_methods`."""
    found = {file.stem: file.read_text().strip() for file in sorted(RESULTS.glob("*.md"))}
    # One of each GPU that gpu_check.py ran on.
    gpus = [f"### {gpu_of(name)}\n\n{found.pop(name)}" for name in list(found) if name.startswith("gpu-")]
    found["gpu"] = "\n\n".join(gpus) or "not measured yet"
    found["demo_short"] = demo_short(found["demo"], json.loads((RESULTS / "demo.json").read_text()))
    found |= {"methods": methods_table(), "parameters": parameters_table()}
    return found | {"other_methods": others_table()}


def gpu_of(name: str) -> str:
    return json.loads((RESULTS / f"{name}.json").read_text())["machine"]["gpu"]


def demo_short(whole: str, data: dict) -> str:
    """Of the demo's table the evolved merge, the best baseline of every seed, and the base."""
    shown = {"**evolved**", "base", *(max(found, key=found.get) for found in data["baselines"])}
    head, *rows, facts = [part for part in re.split(r"\n+", whole) if not part.startswith("**")]
    kept = [row for row in rows if row.startswith("|---") or row.split("|")[1].strip() in shown]
    return "\n".join([head, *kept, "", facts])


def methods_table() -> str:
    """One row per method."""
    columns = ["method", "what it does", "models", "parameters", "searched", "needs", "result"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    quoted = lambda names: ", ".join(f"`{name}`" for name in names)
    for name, method in METHODS.items():
        title = f"[{name}]({method.reference})" if method.reference else name
        cells = [title, method.summary, models(method), quoted(method.parameters), quoted(method.searched)]
        cells += [method.needs, method.result]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def others_table() -> str:
    """One row per method that is no plain merge."""
    lines = ["| method | what it does | needs | result |", "|---|---|---|---|"]
    for name, row in (LEARNED | VARIANTS | ZIPPED).items():
        lines.append(f"| [{name}]({row.reference}) | {row.summary} | {row.needs} | {row.result} |")
    return "\n".join(lines)


def models(method: Method) -> str:
    """How many models a method takes, and what the base is to it."""
    low, high = method.experts
    count = f"{low}" if low == high else f"{low} to {high}"
    said = {"required": "a base and {}", "optional": "{}; a base or none", "source": "{}, a base among them"}
    return said[method.base].format(count)


def parameters_table() -> str:
    """One row per parameter and default, with the methods that have it so."""
    rows: dict[tuple, list[str]] = defaultdict(list)
    for name, method in METHODS.items():
        for parameter, spec in method.parameters.items():
            rows[parameter, spec.help, spec.scope, default(spec), bounds(spec), searched(spec)].append(name)
    columns = ["parameter", "meaning", "one value for each", "default", "values", "a search's bounds", "methods"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    order = list(dict.fromkeys(key[0] for key in rows))
    for key in sorted(rows, key=lambda key: order.index(key[0])):
        parameter, meaning, scope, *others = key
        each = {"shared": "tensor", "expert": "expert", "source": "model"}[scope]
        cells = [f"`{parameter}`", meaning, each, *others, ", ".join(rows[key])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def default(spec: Parameter) -> str:
    """A default as YAML has it."""
    if spec.default is REQUIRED:
        return "required"
    return "none" if spec.default is None else yaml.safe_dump(spec.default).splitlines()[0]


def bounds(spec: Parameter) -> str:
    """The values that a parameter takes."""
    if spec.kind is bool:
        return "true, false"
    kind = "whole numbers" if spec.kind is int else "numbers"
    infinite = float("inf")
    if (spec.low, spec.high) == (-infinite, infinite):
        return kind
    if spec.high == infinite:
        return f"{kind} {'above' if spec.open_low else 'from'} {spec.low:g}"
    return f"{kind} in {'(' if spec.open_low else '['}{spec.low:g}, {spec.high:g}]"


def searched(spec: Parameter) -> str:
    """Where a search looks unless `bounds` says otherwise; empty where no search varies it."""
    return "" if spec.gene is None else f"{spec.gene.low:g} to {spec.gene.high:g}"


def updated(text: str, known: dict[str, str], where: str) -> str:
    """The document with its tables as they are now. Raises KeyError for a mark that names none."""

    def replaced(match: re.Match) -> str:
        name = match[1]
        if name not in known:
            raise KeyError(f"{where}: no table {name!r}; expected one of {', '.join(sorted(known))}")
        return f"<!-- table {name} -->\n{known[name]}\n<!-- /table -->"

    return MARK.sub(replaced, text)


def main() -> None:
    """Rewrite what has changed."""
    known = tables()
    for file in documents():
        text = file.read_text()
        if (now := updated(text, known, file.name)) != text:
            file.write_text(now)
            print(f"updated {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
