"""What switching a task costs in a live model, beside a copy of the same weights.

python benchmarks/switch.py [--repeats N] [--save]    about two minutes

EMR reads the base, the unified model and one bit per weight, whatever the number of tasks; onebit the base and one
bit; byom_fft writes the places of the task before and of this one alone. Bytes moved a second, over those of
torch.copy_ between two sets of the same weights, in turn. bfloat16, a Llama of 90 M parameters, eight tasks.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from measure import alternating, median, report, table

from merge3 import Pool, Recipe, Slot
from merge3.variants import Variants
from merge3.world.family import make_family

SIZES = dict(hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=12, vocab_size=8192)
LAYERS, TASKS = 11, 8
METHODS = {
    "emr": {"merge_method": "emr"},
    "onebit": {"merge_method": "onebit"},
    "byom_fft, 1 %": {"merge_method": "byom_fft", "parameters": {"share": 0.01}},
    "byom_fft, 10 %": {"merge_method": "byom_fft", "parameters": {"share": 0.1}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        rows, data = measured(Path(folder), options.repeats)
    columns = ["method", "switching a task", "bytes moved", "of copy's bandwidth", "spread", "time of a copy"]
    text = table("Switching a task, bfloat16, 8 tasks", columns, rows)
    report("switch", text, data, options.save)


def measured(folder: Path, repeats: int) -> tuple[list[list[str]], dict]:
    """(rows, their numbers)"""
    make_family(folder, TASKS, torch.bfloat16, layers=LAYERS, **SIZES)
    experts = [str(folder / f"e{k}") for k in range(TASKS)]
    slot = Slot(Pool.open(str(folder / "base"), experts))
    weights = list(slot.written().values())
    size = sum(weight.numel() for weight in weights)
    others = [torch.randn_like(weight) for weight in weights]
    spare = [torch.empty_like(weight) for weight in weights]
    rows, data = [], {"parameters": size}
    for name, settings in METHODS.items():
        models = [{"model": expert} for expert in experts]
        recipe = Recipe.parse(settings | {"base_model": str(folder / "base"), "models": models})
        variants = slot.variants(recipe)
        slot.swap(recipe, task="e0")
        tasks = iter([f"e{k % TASKS}" for k in range(1, 100 * repeats)])

        def copy():
            for out, source in zip(spare, others):
                out.copy_(source)

        switch = lambda recipe=recipe, tasks=tasks: slot.swap(recipe, task=next(tasks))
        times = alternating({"switch": switch, "copy": copy}, repeats)
        moved = bytes_moved(variants, size)
        ratios = [(moved / s) / (4 * size / c) for s, c in zip(times["switch"], times["copy"])]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        seconds, of_copy = median(times["switch"]), median(times["switch"]) / median(times["copy"])
        cells = [f"{1000 * seconds:.0f} ms", f"{moved / 1e6:.0f} MB", f"**{median(ratios):.2f}**", spread]
        rows.append([name, *cells, f"{of_copy:.2f}"])
        data[name] = {"seconds": times, "bytes": moved, "ratios": ratios}
        print(rows[-1], flush=True)
    return rows, data


def bytes_moved(variants: Variants, size: int) -> int:
    """Read and written in one switch, all tasks being alike."""
    told = variants.tasks["e1"]
    if "kept" in told:  # the old places: read the common weight, write it; the new ones: read value and place, write
        places = told["bytes"] - 2 * told["kept"]
        return 2 * places + 8 * told["kept"]
    shared = 2 if any(name.startswith("/base/") for name in variants.parts.tensors) else 1
    return 2 * size * (shared + 1) + told["bytes"]


if __name__ == "__main__":
    main()
