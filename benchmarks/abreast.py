"""What does one read of the models for several candidates save?

python benchmarks/abreast.py [--save]    a base and three experts of 100 million parameters in bfloat16, some minutes
python benchmarks/abreast.py --device cuda [--save]    of 400 million, where what is streamed comes from host memory

Four candidates merged layer by layer beside each other, and one after the other: seconds of merging, and of a candidate
as a whole with some questions; once with all weights resident, once with a budget for a quarter of them, of which the
candidates' blocks take their room too, the rest streamed from files that the system has in memory. Answers are
compared: they must be the same.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from measure import alternating, median, report, table

from merge3 import Pool, Recipe, Slot
from merge3.abreast import Abreast
from merge3.tasks.lm import LM
from merge3.tasks.requests import Choices
from merge3.world.family import make_family

SHAPES = {
    "cpu": {"layers": 10, "hidden_size": 768, "intermediate_size": 2560, "vocab_size": 14_000},
    "cuda": {"layers": 24, "hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 32_000},
}
WORDS = min(shape["vocab_size"] for shape in SHAPES.values())
MODELS = {"cpu": "100 M parameters", "cuda": "400 M parameters"}
METHODS = {"task_arithmetic": {}, "ties": {"density": 0.5}, "dare_ties": {"density": 0.5}}
TOGETHER = 4


def recipes(method: str, models: list[str]) -> list[Recipe]:
    """As candidates of a search differ: by their weights."""
    found = []
    for number in range(TOGETHER):
        sources = [
            {"model": model, "parameters": {"weight": 0.3 + 0.1 * ((number + at) % 4)} | METHODS[method]}
            for at, model in enumerate(models[1:])
        ]
        found.append(Recipe.parse({"merge_method": method, "base_model": models[0], "models": sources}))
    return found


def questions(items: int, tokens: int) -> list[Choices]:
    """Of so many tokens, the first half of them in common, with two choices of two tokens."""
    random = torch.Generator().manual_seed(0)
    draw = lambda count: tuple(torch.randint(5, WORDS, (count,), generator=random).tolist())
    shared = draw(tokens // 2)
    return [Choices((*shared, *draw(tokens - tokens // 2)), (draw(2), draw(2))) for _ in range(items)]


def row(pool: Pool, method: str, models: list[str], items: int, tokens: int, repeats: int) -> dict:
    """Seconds of one candidate."""
    slot = Slot(pool)
    question = LM(slot.model).loglikelihoods(questions(items, tokens))
    asked, answers = recipes(method, models), {}
    abreast = Abreast(slot, question.passes(slot.model))
    pool.reserve(TOGETHER * abreast.size)
    merging = {"one by one": [], "abreast": []}

    def one_by_one():
        found = []
        for recipe in asked:
            slot.swap(recipe)
            found.append({at: told.sums.tolist() for at, told in question(slot.model)})
        answers["one by one"] = found

    def together():
        programs = [slot.compile(recipe) for recipe in asked]
        told, seconds = abreast.ask(programs, [[question.passes(slot.model)] for _ in programs])
        merging["abreast"].append(seconds / TOGETHER)
        answers["abreast"] = [{at: found.sums.tolist() for at, found in own} for (own,) in told]

    whole = alternating({"one by one": one_by_one, "abreast": together}, repeats)
    assert answers["one by one"] == answers["abreast"]

    def swapped():
        for recipe in asked:
            slot.swap(recipe)
        if pool.device.type == "cuda":
            torch.cuda.synchronize()

    swaps = alternating({"swap": swapped}, repeats)["swap"]
    # Work that is given to a GPU has not been done when the call returns: merging abreast is not timed there.
    together_merged = median(merging["abreast"][1:]) if pool.device.type == "cpu" else None
    return {
        "method": method,
        "streamed": pool.memory.file + pool.memory.host,
        "merge": median(swaps) / TOGETHER,
        "merge abreast": together_merged,
        "candidate": median(whole["one by one"]) / TOGETHER,
        "candidate abreast": median(whole["abreast"]) / TOGETHER,
        "items": items,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--items", type=int, nargs="*", default=[4, 16])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    arguments = parser.parse_args()
    device = arguments.device
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_family(Path(folder), dtype=torch.bfloat16, scale=0.01, **SHAPES[device])
        models = [str(Path(folder) / name) for name in ("base", "e0", "e1", "e2")]
        whole = Pool.open(models[0], models[1:], device).memory
        for budget in (None, whole.slot + (whole.total - whole.slot) // 4):
            for method in METHODS:
                for items in arguments.items:
                    pool = Pool.open(models[0], models[1:], device, memory_budget=budget)
                    pool.read_all()
                    rows.append(row(pool, method, models, items, arguments.tokens, arguments.repeats))
                    print(rows[-1], flush=True)
    merging = device == "cpu"
    columns = (
        "weights",
        "method",
        *(("merge, s", "abreast", "ratio") * merging),
        "items",
        "candidate, s",
        "abreast",
        "ratio",
    )
    shown = []
    for one in rows:
        where = f"{one['streamed'] / 2**20:.0f} MiB streamed" if one["streamed"] else "resident"
        line = [where, one["method"]]
        for what in (["merge"] * merging) + ["candidate"]:
            alone, abreast = one[what], one[f"{what} abreast"]
            line += [one["items"]] * (what == "candidate") + [
                f"{alone:.3f}",
                f"{abreast:.3f}",
                f"{alone / abreast:.2f}",
            ]
        shown.append(line)
    of = MODELS[device] if device == "cpu" else f"{MODELS[device]} on {torch.cuda.get_device_name()}"
    title = f"A candidate of K = 3 at {of}, bfloat16: one by one, and {TOGETHER} abreast"
    name = "abreast" if device == "cpu" else "abreast_gpu"
    report(name, table(title, columns, shown), {"rows": rows}, arguments.save)


if __name__ == "__main__":
    main()
