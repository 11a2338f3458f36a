"""merge3-client merge, and mergekit on our kernels, against mergekit-yaml on one recipe: wall time and peak memory of
whole processes.

A 0.1 B parameter Llama, three experts, bfloat16. python benchmarks/merge_command.py [--methods ties dare_ties] [--save]
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from measure import median, report, table


def make_models(root: Path) -> int:
    """A base and three experts that differ by small noise, a third of it exactly zero. Returns parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(root / "base")
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    for i in range(3):
        with torch.no_grad():
            for name, p in model.named_parameters():
                noise = torch.randn(p.shape) * 0.002 * (torch.rand(p.shape) > 0.31)
                p.copy_((start[name].float() + noise).to(torch.bfloat16))
        model.save_pretrained(root / f"e{i}")
    return sum(p.numel() for p in model.parameters())


def measured(command: list[str]) -> tuple[float, int]:
    """(wall seconds, peak resident bytes) of one process."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed: {errors.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["ties", "dare_ties", "task_arithmetic", "linear"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    root, programs = Path(tempfile.mkdtemp()), Path(sys.executable).parent
    rows, data = [], {}
    try:
        parameters = make_models(root)
        for method in options.methods:
            recipe = {
                "merge_method": method,
                "dtype": "bfloat16",
                "models": [{"model": str(root / f"e{i}"), "parameters": {"weight": 0.4}} for i in range(3)],
            }
            if method != "linear":
                recipe["base_model"] = str(root / "base")
            if method in ("ties", "dare_ties"):
                recipe["parameters"] = {"density": 0.5}
            (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
            found: dict[str, list[tuple[float, int]]] = {"merge3": [], "adapter": [], "mergekit": []}
            for _ in range(options.repeats):
                for name, command in (
                    ("merge3", [programs / "merge3-client", "merge", root / "recipe.yaml", root / "out", "--quiet"]),
                    (
                        "adapter",
                        [
                            sys.executable,
                            "-m",
                            "merge3.adapters.mergekit",
                            root / "recipe.yaml",
                            root / "out",
                            "--quiet",
                        ],
                    ),
                    ("mergekit", [programs / "mergekit-yaml", root / "recipe.yaml", root / "out", "--quiet"]),
                ):
                    shutil.rmtree(root / "out", ignore_errors=True)
                    found[name].append(measured([str(c) for c in command]))
            wall = {n: median([w for w, _ in f]) for n, f in found.items()}
            peak = {n: median([p for _, p in f]) for n, f in found.items()}
            data[method] = {"wall": wall, "peak": peak}
            faster = {n: f"**{wall['mergekit'] / w:.1f}x**" for n, w in wall.items()}
            # linear is not among the methods that the adapter takes over
            adapter = ["", ""] if method == "linear" else [f"{wall['adapter']:.1f}", faster["adapter"]]
            rows.append(
                [
                    method,
                    f"{wall['mergekit']:.1f}",
                    f"{wall['merge3']:.1f}",
                    faster["merge3"],
                    *adapter,
                    f"{peak['mergekit'] / 1e9:.2f}",
                    f"{peak['merge3'] / 1e9:.2f}",
                ]
            )
    finally:
        shutil.rmtree(root, ignore_errors=True)
    columns = [
        "method",
        "mergekit s",
        "merge3 s",
        "faster",
        "mergekit on our kernels s",
        "faster",
        "mergekit peak GB",
        "merge3 peak GB",
    ]
    title = f"Merging three {parameters / 1e6:.0f} M parameter experts, bfloat16, whole process"
    report("merge_command", table(title, columns, rows), data, options.save)


if __name__ == "__main__":
    main()
