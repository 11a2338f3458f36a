"""What deriving an expert by linear algebra costs, and what a search over it costs afterwards.

python benchmarks/derived.py [--layers 24] [--save]    about ten minutes on two cores

A Llama of 93 M parameters and three experts, each changed by a low-rank matrix and noise in every tensor. First, one
matrix of every shape in a layer: seconds of each method here and of fusion_bench 0.2.33, on the same task vectors in
one process. Then a whole model: one derivation, and candidates of a search over lambda beside those of task arithmetic
over the same pool.
"""

import argparse
import contextlib
import importlib.util
import io
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import alternating, median, report, table
from safetensors.torch import load_file, save_file

from merge3 import Pool, Recipe, Slot
from merge3.checkpoint.layout import Ref
from merge3.methods import METHODS, Job, spectral
from merge3.world.family import make_family

SIZES = {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 16000}
RANK, EXPERTS = 16, 3
LAYER = "model.layers.0."
MEASURED = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")  # one of every shape
Vectors = list[dict[str, torch.Tensor]]  # of every expert: name -> task vector


def each(derive: Callable[[list[torch.Tensor]], torch.Tensor]) -> Callable[[Vectors], None]:
    """A method that sees one tensor at a time."""

    def all_of_them(vectors: Vectors) -> None:
        for name in vectors[0]:
            derive([own[name] for own in vectors])

    return all_of_them


def whole_doge(vectors: Vectors) -> None:
    """Its row as a pool runs it: thresholds of the whole model, 400 steps a tensor, masks, sum."""
    row = METHODS["doge"]
    shared = {name: parameter.default for name, parameter in row.parameters.items()}
    jobs = []
    for name, vector in vectors[0].items():
        sources = tuple(Ref(f"e{i}", name) for i in range(len(vectors)))
        jobs.append(Job(name, Ref("base", name), sources, shared, ({},) * len(vectors), tuple(vector.shape)))

    def read(jobs):
        for job in jobs:
            yield job, [torch.zeros(job.shape), *(own[job.name] for own in vectors)]

    thresholds = row.survey(jobs, read)
    for job, tensors in read(jobs):
        row.derive(job, tensors, thresholds)


OURS = {
    "iso_c": each(spectral.isotropic),
    "tsv_m": each(spectral.separated),
    "wudi": each(lambda vectors: spectral.least_interference(vectors, 300, 1e-5)),
    "wudi, closed": each(lambda vectors: spectral.least_interference_closed(vectors, 0.1)),
    "doge": whole_doge,
}
WHOLE = {"iso_c": {}, "tsv_m": {}, "wudi": {"closed": True}}  # those that a whole model takes minutes at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--only", nargs="+", default=list(OURS), help="of the methods that fusion_bench is compared in")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    theirs = reference()
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder), options.layers)
        vectors, rows, data = task_vectors(world), [], {}
        for name in options.only:
            data[name] = compared(OURS[name], theirs.get(name), vectors)
            ours, fusion = data[name]["ours"], data[name]["fusion_bench"]
            rows.append([name, f"{ours:.2f}", f"{fusion:.2f}" if fusion else "", ratio(fusion, ours)])
            print(rows[-1], flush=True)
        columns = ["method", "seconds", "fusion_bench's", "times as fast"]
        text = table(f"One matrix of every shape of a layer, {EXPERTS} experts", columns, rows)
        pool = Pool.open(str(world / "base"), [str(world / f"e{i}") for i in range(EXPERTS)])
        rows, candidates = [], searched(pool, world)
        for name, (derivation, swap) in candidates.items():
            relative = swap / candidates["task_arithmetic"][1]
            rows.append([name, f"{derivation:.1f}" if derivation else "", f"{1e3 * swap:.1f}", f"**{relative:.2f}**"])
        parameters = sum(math.prod(info.shape) for info in pool.base_checkpoint.tensors.values())
        columns = ["method", "derived once, s", "a candidate's swap, ms", "of task arithmetic's"]
        text += "\n\n" + table(f"A search over lambda, {parameters / 1e6:.0f} M parameters", columns, rows)
    data = {"alone": data, "searched": candidates, "layers": options.layers}
    report("derived", text, data, options.save)


def ratio(theirs: float | None, ours: float) -> str:
    """How many times as fast."""
    return f"**{theirs / ours:.1f}x**" if theirs else ""


def reference() -> dict:
    """Method -> fusion_bench's merge of task vectors by name, which prints a lot; none where it is not installed."""
    if importlib.util.find_spec("fusion_bench") is None:
        return {}
    file = Path(__file__).resolve().parents[1] / "tests" / "methods" / "run_fusion_bench.py"
    spec = importlib.util.spec_from_file_location("run_fusion_bench", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MERGES


def make_world(folder: Path, layers: int) -> Path:
    """folder/base and folder/e0, ..: low-rank changes, each about as large as its noise, a hundredth of the weights."""
    make_family(folder, experts=EXPERTS, layers=layers, **SIZES)
    base, rng = load_file(folder / "base" / "model.safetensors"), torch.Generator().manual_seed(0)
    for i in range(EXPERTS):
        tensors = {}
        for name, tensor in base.items():
            change = torch.randn(tensor.shape, generator=rng)
            if tensor.dim() == 2:
                left, right = (torch.randn(size, RANK, generator=rng) for size in tensor.shape)
                change += left @ right.T / RANK**0.5
            tensors[name] = tensor + change * 2e-4
        save_file(tensors, folder / f"e{i}" / "model.safetensors", metadata={"format": "pt"})
    return folder


def task_vectors(world: Path) -> list[dict[str, torch.Tensor]]:
    """Of every expert those that are measured, named as fusion_bench asks encoders' to be."""
    base = load_file(world / "base" / "model.safetensors")
    found = []
    for i in range(EXPERTS):
        expert = load_file(world / f"e{i}" / "model.safetensors")
        names = {f"encoder.{LAYER}{name}": LAYER + name for name in MEASURED}
        found.append({name: expert[stored] - base[stored] for name, stored in names.items()})
    return found


def compared(ours, theirs, vectors: Vectors) -> dict[str, float | None]:
    """Seconds of both; theirs None where there is none."""

    def all_of_ours() -> None:
        with torch.no_grad():
            ours(vectors)

    timed = {"ours": all_of_ours}
    if theirs is not None:
        timed["fusion_bench"] = lambda: theirs(vectors)
    seconds: dict[str, float | None] = {"fusion_bench": None}
    for name, act in timed.items():
        act_once(act) if name == "ours" else None  # torch loads what optimizers need
        seconds[name] = act_once(act)
    return seconds


def act_once(act) -> float:
    """Seconds; these take long enough for one to do."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        act()
    return time.perf_counter() - start


def searched(pool: Pool, world: Path) -> dict[str, tuple[float | None, float]]:
    """Method -> (seconds of the one derivation, median seconds of a candidate's swap)."""
    slot, derivations, acts = Slot(pool), {"task_arithmetic": None}, {}
    turns = iter(range(1_000_000))

    def candidate(method: str, common: dict) -> Recipe:
        """A new lambda every time."""
        models = [{"model": str(world / f"e{i}")} for i in range(EXPERTS)]
        parameters = common | {"lambda": 0.5 + 1e-6 * next(turns)}
        data = {"merge_method": method, "base_model": str(world / "base"), "models": models, "parameters": parameters}
        return Recipe.parse(data)

    for method, common in {"task_arithmetic": {"weight": 0.5}, **WHOLE}.items():
        acts[method] = lambda method=method, common=common: slot.swap(candidate(method, common))
        if method in WHOLE:
            derivations[method] = act_once(acts[method])
    times = alternating(acts, 9)
    return {method: (derivations[method], median(times[method])) for method in acts}


if __name__ == "__main__":
    main()
