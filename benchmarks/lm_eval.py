"""What do lm-eval's documents cost a candidate, beside items of a file, and beside lm-eval's own evaluation?

2,000 documents of four choices, a 20 M parameter Llama and an expert; a whole small benchmark with and without five
worked examples before each document, the same for all. python benchmarks/lm_eval.py [--save]
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from measure import alternating, median, report, table
from score import WORDS, world

from merge3 import LocalEngine, Pool, Recipe, Registration
from merge3.adapters.lm_eval import Settings, load_benchmark
from merge3.tasks import Item

sys.path.remove(str(Path(__file__).resolve().parent))  # where this script would stand for the package of its name
DOCUMENTS = 2000
SHOTS = 5  # worked examples
ASKED, BENCHMARK = 20, 100  # documents of a candidate: in a search that estimates, and on a whole small benchmark


def make_checkpoints(folder: Path) -> None:
    """base and expert, with their tokenizer."""
    import shutil

    model, _, tokenizer = world()
    for name in ("base", "expert"):
        model.save_pretrained(folder / name)
        for file in Path(tokenizer).iterdir():
            shutil.copy(file, folder / name)
        with torch.no_grad():
            for p in model.parameters():
                p += torch.randn_like(p) * 0.01 * p.std()


def make_tasks(folder: Path) -> list[dict]:
    """A multiple-choice task over a file, for lm-eval, and the same with worked examples; its documents."""
    rng = np.random.default_rng(0)
    words = lambda count: " ".join(f"w{rng.integers(WORDS - 2)}" for _ in range(count))
    documents = []
    for _ in range(DOCUMENTS + SHOTS):
        choices = [words(int(rng.integers(1, 5))) for _ in range(4)]
        documents.append({"text": words(int(rng.integers(40, 80))), "choices": choices, "label": int(rng.integers(4))})
    files = {"test": documents[:DOCUMENTS], "shots": documents[DOCUMENTS:]}
    for name, own in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, own)))
    data = {name: str(folder / f"{name}.jsonl") for name in files}
    task = {
        "task": "quiz",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": data, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "fewshot_split": "shots",
        "fewshot_config": {"sampler": "first_n"},
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "quiz.yaml").write_text(yaml.safe_dump(task))
    (folder / "quiz_shots.yaml").write_text(yaml.safe_dump(task | {"task": "quiz_shots", "num_fewshot": SHOTS}))
    return files["test"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    make_checkpoints(root)
    documents = make_tasks(root)
    base, expert = str(root / "base"), str(root / "expert")
    engine = LocalEngine(Pool.open(base, [expert]))
    sources = [{"model": expert, "parameters": {"weight": 0.5}}]
    recipe = Recipe.parse({"merge_method": "task_arithmetic", "base_model": base, "models": sources})

    benchmark = load_benchmark("quiz", Settings(), base, [str(root)])
    judges = {"quiz": benchmark.judge}
    items = []
    for number, doc in enumerate(documents):
        choices = tuple(f" {choice}" for choice in doc["choices"])
        items.append(Item(str(number), "quiz", "choice", doc["text"], doc["label"], choices, "acc"))
    chosen = np.random.default_rng(1).permutation(DOCUMENTS)[:ASKED]
    few_documents = Registration(tuple(benchmark.items[i] for i in chosen), judges=judges)
    few_items = Registration(tuple(items[i] for i in chosen))
    evaluate = lambda asked: next(iter(engine.evaluate(asked, [recipe]))).answers()
    assert np.array_equal(evaluate(few_documents), evaluate(few_items))
    few = alternating(
        {"documents": lambda: evaluate(few_documents), "items": lambda: evaluate(few_items)}, 5 * options.repeats
    )
    times = dict(few)
    for task in ("quiz", "quiz_shots"):
        loaded = load_benchmark(task, Settings(), base, [str(root)])
        many = Registration(tuple(loaded.items[:BENCHMARK]), judges={task: loaded.judge})
        theirs = own_evaluation(engine, recipe, root, task)
        assert abs(theirs() - evaluate(many).mean()) < 1e-9
        ours = lambda many=many: evaluate(many)
        found = alternating({"merge3": ours, "lm-eval": theirs}, max(3, options.repeats // 3))
        times |= {f"{task}, {name}": taken for name, taken in found.items()}
    t = {name: median(taken) for name, taken in times.items()}
    rows = [
        [f"{ASKED} of {DOCUMENTS:,}", "documents", f"{1e3 * t['documents']:.1f}", ""],
        ["", "the same as items of a file", f"{1e3 * t['items']:.1f}", f"**{t['documents'] / t['items']:.2f}**"],
    ]
    for task, with_what in (("quiz", ""), ("quiz_shots", f", {SHOTS} worked examples before each")):
        ours, theirs = t[f"{task}, merge3"], t[f"{task}, lm-eval"]
        rows.append([f"{BENCHMARK} of {DOCUMENTS:,}", f"documents{with_what}", f"{1e3 * ours:.1f}", ""])
        ratio = f"**{theirs / ours:.1f}x** as long"
        rows.append(["", "`simple_evaluate`, the model in memory", f"{1e3 * theirs:.1f}", ratio])
    columns = ["asked", "how", "ms per candidate, merging included", "ratio"]
    text = table("A candidate on lm-eval's documents, 20 M parameters", columns, rows)
    report("lm_eval", text, {"seconds": t, "times": times}, options.save)


def own_evaluation(engine: LocalEngine, recipe: Recipe, root: Path, task: str):
    """One candidate as mergekit-evolve evaluates it in memory: merge, then simple_evaluate over the live model."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoTokenizer

    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    live = HFLM(pretrained=engine.slot.model, tokenizer=tokenizer, batch_size=32)
    manager = TaskManager(include_path=str(root), include_defaults=False)

    def evaluate() -> float:
        engine.slot.swap(recipe)
        found = lm_eval.simple_evaluate(
            model=live, tasks=[task], task_manager=manager, limit=BENCHMARK, log_samples=False
        )
        return found["results"][task]["acc,none"]

    return evaluate


if __name__ == "__main__":
    main()
