"""What does a step of a learned merge cost beside the same batch through the plain model, and beside eager torch?

python benchmarks/fit.py [--save]    K = 3 experts, a Llama of 100 M parameters, float32

plain: forward and backward with LoRA adapters (peft, rank 8, every linear layer) as all that has gradients. full:
forward and backward to every weight. eager: task vectors times weights, summed by autograd. Peaks are of processes of
their own, with the pool in them, and beside it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from measure import alternating, median, report, table

from merge3 import Pool, Recipe
from merge3.learn.distributions import Asked, log_probabilities
from merge3.learn.fit import merged_with
from merge3.learn.weighted import Weighted
from merge3.live.slot import Slot
from merge3.tasks import Item
from merge3.world.family import make_family
from merge3.world.kept import made

WORLDS = Path("build/worlds").resolve()
SIZES = dict(hidden_size=768, intermediate_size=2048, num_attention_heads=12, vocab_size=16384, layers=11)
ROWS, LENGTH, ANSWER = 16, 32, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    world = made(WORLDS, make_family, experts=3, scale=0.002, **SIZES)
    if options.peak:
        peak(world, options.peak)
        return
    peaks = {name: peak_of(name) for name in WAYS}
    print(peaks, flush=True)
    ways = {name: way(world) for name, way in WAYS.items() if name != "pool"}
    times = {name: median(own) for name, own in alternating(ways, options.repeats).items()}
    print(times, flush=True)
    rows = []
    for name, seconds in times.items():
        cells = [f"{seconds:.2f}", f"**{seconds / times['plain']:.2f}**", f"{peaks[name] / 1e9:.2f}"]
        merges = name in ("ours", "eager")  # the others hold no pool
        beside = f"{(peaks[name] - peaks['pool']) / 1e9:.2f}" if merges else ""
        rows.append([NAMES[name], *cells, beside, f"{peaks['eager'] / peaks[name]:.1f}x" if merges else ""])
    columns = ["a step", "s", "of plain", "peak GB", "beside pool and live model GB", "eager's peak is"]
    title = f"{ROWS} rows of {LENGTH} tokens, 3 experts of a 100 M parameter Llama, float32"
    report("fit", table(title, columns, rows), {"seconds": times, "peaks": peaks}, options.save)


def opened(world: Path) -> tuple[Slot, Weighted]:
    models = [str(world / name) for name in ("base", "e0", "e1", "e2")]
    slot = Slot(Pool.open(models[0], models[1:]))
    data = {"merge_method": "supermerge", "base_model": models[0], "fit": {"items": ["none"]}}
    recipe = Recipe.parse(data | {"models": [{"model": model} for model in models[1:]]})
    return slot, Weighted(slot, slot.compile(merged_with(recipe, dict.fromkeys(models[1:], 0.3))))


def batch() -> list[Asked]:
    rng = torch.Generator().manual_seed(0)
    found = []
    for row in range(ROWS):
        tokens = tuple(torch.randint(3, 16000, (LENGTH + 1,), generator=rng).tolist())
        found.append(Asked(Item(str(row), "t", "generate", "", ("",)), tokens[:-ANSWER], (tokens[-ANSWER:],)))
    return found


def loss(model) -> torch.Tensor:
    total = 0.0
    for one, log_p in zip(BATCH, log_probabilities(model, BATCH)):
        total = total - log_p.gather(-1, torch.tensor(one.answers[0])[:, None]).mean()
    return total


def ours(world: Path):
    """A merge, a pass, and gradients that become numbers."""
    _, weighted = opened(world)
    weights = torch.full(weighted.gradient.shape, 0.3)

    def step():
        weighted.write(weights)
        with weighted.gradients():
            loss(weighted.slot.model).backward()

    return step


def plain(world: Path):
    """LoRA adapters alone have gradients."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "base").eval()
    wrapped = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear")).eval()

    def step():
        loss(wrapped.base_model.model).backward()
        wrapped.zero_grad()

    return step


def full(world: Path):
    """Every weight has a gradient."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(world / "base").eval()

    def step():
        loss(model).backward()
        model.zero_grad()

    return step


def eager(world: Path):
    """The merge as autograd sees it in plain torch: a task vector is a temporary for every expert and tensor."""
    slot, weighted = opened(world)
    get, jobs = slot.pool.get, weighted.jobs
    weights = torch.full((len(jobs), 3), 0.3, requires_grad=True)

    def step():
        merged = {}
        for at, job in enumerate(jobs):
            base = get(job.base)
            vectors = [get(source) - base for source in job.sources]
            merged[job.name] = base + sum(weights[at, k] * vector for k, vector in enumerate(vectors))
        with torch.nn.utils.stateless._reparametrize_module(slot.model, merged):
            loss(slot.model).backward()
        weights.grad = None

    return step


def pool(world: Path):
    """The models in memory, read, and the live one."""
    slot, weighted = opened(world)

    def step():
        for job in weighted.jobs:
            for ref in job.refs:
                slot.pool.get(ref).sum()

    return step


WAYS = {"ours": ours, "plain": plain, "full": full, "eager": eager, "pool": pool}
NAMES = {
    "ours": "merge3",
    "plain": "plain model, LoRA gradients",
    "full": "plain model, all gradients",
    "eager": "eager torch",
}
BATCH = batch()


def peak(world: Path, name: str) -> None:
    step = WAYS[name](world)
    step()
    step()
    # Not getrusage, whose peak a process inherits from the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024)


def peak_of(name: str) -> int:
    done = subprocess.run([sys.executable, __file__, "--peak", name], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
