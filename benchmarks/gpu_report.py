"""The files that gpu_check leaves: gpu-<name>.json and .md, or rehearsal.json and .md."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from measure import table

CHECKS = ("tests", "memcheck", "racecheck")


def name_of(machine: dict) -> str:
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-") if "gpu" in machine else "rehearsal"


def earlier(machine: dict, folder: Path) -> dict:
    """Steps that a call before this one left in the folder, of the same machine and the same kernels."""
    try:
        found = json.loads((folder / f"{name_of(machine)}.json").read_text())
    except FileNotFoundError:
        return {}
    return found["steps"] if found["machine"] == machine else {}


def write(found: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = name_of(found["machine"])
    replace(folder / f"{name}.json", json.dumps(found, indent=1) + "\n")
    replace(folder / f"{name}.md", "\n\n".join(sections(found["machine"], found["steps"])) + "\n")


def replace(path: Path, text: str) -> None:
    """Whoever ends this process, and whenever: the file is whole, as it was or as it is to be."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sections(machine: dict, steps: dict) -> list[str]:
    lines = [] if "gpu" in machine else ["Rehearsed on a CPU, small: the form of a report, and no measurement."]
    rows_of = lambda step: steps.get(step, {}).get("rows", [])
    if rows := rows_of("bandwidth"):
        shown = [
            [
                r["shape"] + ("" if r["layers"] == r["of_layers"] else f", {r['layers']} layers"),
                r["experts"],
                r["sparsify"],
                r["elect"] + (", normalized" if r["normalize"] else ""),
                f"{r['ms']:.2f}",
                f"{r['bandwidth'] / 1e12:.2f}",
                f"**{r['of_copy']:.2f}**",
            ]
            for r in rows
        ]
        fastest = max(r["copy_bandwidth"] for r in rows)
        lines.append(
            table(
                f"Swap in one launch, bfloat16; a copy moves {fastest / 1e12:.2f} TB/s",
                ["model", "experts", "sparsify", "elect", "ms", "TB/s", "of copy"],
                shown,
            )
        )
    if rows := rows_of("eager"):
        shown = [[r["mode"], f"{r['ms']:.3f}", f"{r['eager_ms']:.2f}", f"**{r['times']:.0f}x**"] for r in rows]
        title = "Against eager torch on the same GPU, 16.8 M parameters, 3 experts"
        lines.append(table(title, ["mode", "ms", "eager ms", "faster"], shown))
    if rows := rows_of("candidate"):
        shown = [[r["shape"], f"{r['swap_ms']:.1f}", f"{r['answers_ms']:.1f}"] for r in rows]
        title = "A candidate, 3 experts: swap, then 60 prompts of 128 tokens"
        lines.append(table(title, ["model", "swap ms", "answers ms"], shown))
    if rows := rows_of("variants"):
        lines.append(table(*by_variant(rows)))
    if rows := rows_of("overlap"):
        title = "Swap and first batch, 0.4 B parameters, 2 experts, wall time"
        lines.append(table(title, [r["mode"] for r in rows], [[f"{r['ms']:.1f} ms" for r in rows]]))
    shown = [[r["check"], one_line(r["result"])] for step in CHECKS for r in rows_of(step)]
    shown += [[step, "failed: " + one_line(steps[step]["error"])] for step in steps if "error" in steps[step]]
    shown += [[step, "cut short"] for step in steps if steps[step].get("cut")]
    if shown:
        lines.append(table("Checks", ["check", "result"], shown))
    lines += [f"{step}: {note}" for step, result in steps.items() for note in result.get("notes", [])]
    return [*lines, ", ".join(f"{k} {v}" if k != "gpu" else v for k, v in machine.items())]


def by_variant(rows: list[dict]) -> tuple[str, list[str], list[list]]:
    """A column for each variant; the best of a row stands out."""
    names = list(dict.fromkeys(r["variant"] for r in rows))
    cases: dict[tuple, dict[str, float]] = {}
    for r in rows:
        elect = r["elect"] + (", normalized" if r["normalize"] else "")
        cases.setdefault((r["experts"], r["sparsify"], elect), {})[r["variant"]] = r["of_copy"]
    shown = []
    for case, found in cases.items():
        best = max(found.values())
        cells = [f"{found[n]:.2f}" if n in found else "" for n in names]
        shown.append([*case, *(f"**{c}**" if found.get(n) == best else c for n, c in zip(names, cells))])
    title = f"Builds of the fused merge, {rows[0]['shape']}, bfloat16, of a copy in the same run"
    return title, ["experts", "sparsify", "elect", *names], shown


def one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:200]
