"""Puts the tables of benchmarks/results/ and the list of methods into README.md, between their marks."""

import re
from pathlib import Path

from merge3.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]


def methods_table() -> str:
    lines = ["| method | what it does | parameters |", "|---|---|---|"]
    for name, method in METHODS.items():
        title = f"[{name}]({method.reference})" if method.reference else name
        lines.append(f"| {title} | {method.summary} | {', '.join(f'`{p}`' for p in method.parameters) or ''} |")
    return "\n".join(lines)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    # Made from a GPU's own run of gpu_check.py, or from nothing.
    gpus = [file.read_text().strip() for file in sorted((ROOT / "benchmarks" / "results").glob("gpu-*.md"))]
    blocks = {"methods": methods_table(), "gpu": "\n\n".join(gpus) or "not measured yet"}
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        blocks[file.stem] = file.read_text().strip()
    for name, block in blocks.items():
        pattern = re.compile(rf"<!-- {name} -->(?:.*?<!-- /{name} -->)?", re.S)
        text = pattern.sub(lambda m, n=name, b=block: f"<!-- {n} -->\n{b}\n<!-- /{n} -->", text, count=1)
    readme.write_text(text)


if __name__ == "__main__":
    main()
