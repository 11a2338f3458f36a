"""The files that gpu_check leaves: benchmarks/results/gpu-<name>.json and .md."""

from __future__ import annotations

import json
import re
from pathlib import Path

from measure import table


def write(found: dict) -> None:
    facts_, steps = found["machine"], found["steps"]
    lines = []
    rows_of = lambda step: steps.get(step, {}).get("rows", [])
    if rows := rows_of("bandwidth"):
        shown = [
            [r["shape"] + ("" if r["layers"] == r["of_layers"] else f", {r['layers']} layers"), r["experts"],
             r["sparsify"], r["elect"] + (", normalized" if r["normalize"] else ""),
             f"{r['ms']:.2f}", f"{r['bandwidth'] / 1e12:.2f}", f"**{r['of_copy']:.2f}**"]
            for r in rows
        ]  # fmt: skip
        lines.append(table(f"Swap in one launch, bfloat16; a copy moves {rows[0]['copy_bandwidth'] / 1e12:.2f} TB/s",
                           ["model", "experts", "sparsify", "elect", "ms", "TB/s", "of copy"], shown))  # fmt: skip
    if rows := rows_of("eager"):
        shown = [[r["mode"], f"{r['ms']:.3f}", f"{r['eager_ms']:.2f}", f"**{r['times']:.0f}x**"] for r in rows]
        lines.append(table("Against eager torch on the same GPU, 16.8 M parameters, 3 experts", ["mode", "ms", "eager ms", "faster"], shown))
    if rows := rows_of("candidate"):
        shown = [[r["shape"], f"{r['swap_ms']:.1f}", f"{r['answers_ms']:.1f}"] for r in rows]
        lines.append(table("A candidate, 3 experts: swap, then 60 prompts of 128 tokens", ["model", "swap ms", "answers ms"], shown))
    if rows := rows_of("linear"):
        shown = [[r["rows"], f"{r['merged_linear_ms']:.3f}", f"{r['swap_and_linear_ms']:.3f}"] for r in rows]
        lines.append(table("merged_linear, 4096 x 4096, 3 experts", ["rows of x", "merged_linear ms", "swap + linear ms"], shown))
    if times := steps.get("overlap", {}).get("ms"):
        lines.append(
            table("Swap and first batch, 0.4 B parameters, 2 experts, wall time", list(times), [[f"{t:.1f} ms" for t in times.values()]])
        )
    checks = [[step, result.get("error", "")[:200] or ", ".join(str(v) for k, v in result.items() if k != "seconds")]
              for step, result in steps.items() if step in ("tests", "memcheck", "racecheck")]  # fmt: skip
    if checks:
        lines.append(table("Checks", ["check", "result"], checks))
    lines.append(", ".join(f"{k} {v}" if k != "gpu" else v for k, v in facts_.items()))
    name = "gpu-" + re.sub(r"[^a-z0-9]+", "-", facts_["gpu"].lower()).strip("-")
    folder = Path(__file__).with_name("results")
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (folder / f"{name}.md").write_text("\n\n".join(lines) + "\n")
