"""What gpu_check measures on a GPU, each step on tensors shaped like Llamas. Imported once the kernels are built."""

from __future__ import annotations

import tempfile
import time
from contextlib import contextmanager

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from merge3 import Pool, Recipe, Slot, kernels, packed
from merge3.differentiable import merged
from merge3.errors import ResourceError
from merge3.export import merge_to_disk
from merge3.kernels import Modes
from merge3.reference import merge_ref

# (hidden, intermediate, layers, heads, vocabulary): Llamas of about so many parameters.
SHAPES = {
    "tiny": (64, 128, 2, 4, 500),
    "0.4B": (1024, 2816, 24, 16, 32000),
    "1B": (2048, 5632, 22, 32, 32000),
    "3B": (3200, 8640, 26, 32, 32000),
    "7B": (4096, 11008, 32, 32, 32000),
}
CANDIDATES = ("0.4B", "1B", "3B", "7B")  # from the smallest
PROMPTS, BATCH, LENGTH = 60, 20, 128
FULL = (torch.OutOfMemoryError, ResourceError)
HOW = (("none", False), ("sum", False), ("sum", True), ("count", True))  # election, normalize
COPIED = {"cuda": 1 << 27, "cpu": 1 << 17}  # numbers of eight bytes

# A step is a generator of its rows, and of sentences about what was left out.


def bandwidth(device: torch.device):
    """Swaps of whole models against a copy in the same run, and where the 7B one takes 18 ms or less."""
    cases = [("7B", 3), ("1B", 3), ("7B", 1), ("7B", 8)]
    for shape, count in cases if device.type == "cuda" else [("tiny", k) for k in (3, 1, 8)]:
        try:
            yield from swaps(shape, count, device)
        except FULL as error:
            yield f"{shape}, {count} experts: the rest is left out: {str(error).splitlines()[0]}"
        release(device)


def eager(device: torch.device):
    """The same maths in eager torch on the same GPU."""
    base, experts = random_models([(4096, 4096)] if device.type == "cuda" else [(64, 64)], 3, device)
    out, c, lam = [torch.empty_like(b) for b in base], coefficients(1, 3), torch.ones(1)
    for name, modes in {"plain sum": Modes(), "magnitude + elect": Modes("magnitude", "sum")}.items():
        prepared = kernels.Prepared(out, base, experts, None, (), modes.sparsify)
        prepared.upload(c, lam)
        ours = timed(lambda p=prepared, m=modes: p.launch(m), device)
        plain = lambda m=modes: on_device(merge_ref, base, experts, c.to(device), lam.to(device), m, device)
        theirs = timed(plain, device, 3)
        yield {"mode": name, "ms": 1e3 * ours, "eager_ms": 1e3 * theirs, "times": theirs / ours}


def candidate(device: torch.device):
    """A candidate end to end: every weight of a live model swapped, then 60 prompts of 128 tokens answered."""
    release(device)
    shapes, left_out = ["tiny"], []
    if device.type == "cuda":
        shapes, left_out = candidate_sizes(torch.cuda.mem_get_info(device)[0])
    yield from left_out
    for shape in shapes:
        try:
            yield one_candidate(shape, device)
        except FULL as error:
            yield f"{shape} left out: {str(error).splitlines()[0]}"
        release(device)


def one_candidate(shape: str, device: torch.device) -> dict:
    with torch.device(device), default_dtype(torch.bfloat16):  # never there in float32, which would take twice the room
        model = LlamaForCausalLM(config_of(shape)).eval().requires_grad_(False)
    out = [p.data for p in model.parameters()]
    base, experts = random_models([p.shape for p in out], 3, device)
    prepared = prepare(out, base, experts, "magnitude")
    prompts = torch.randint(0, 500, (PROMPTS, LENGTH), device=device)
    with torch.no_grad():
        swap = timed(lambda: prepared.launch(elected()), device)
        forward = timed(lambda: [model(part, logits_to_keep=1) for part in prompts.split(BATCH)], device, 3)
    parameters = sum(p.numel() for p in out)
    return {"shape": shape, "parameters": parameters, "swap_ms": 1e3 * swap, "answers_ms": 1e3 * forward}


def candidate_sizes(free: int) -> tuple[list[str], list[str]]:
    """Which candidates to measure where so many bytes are free: 1B, and the largest that fits. And what is left out."""
    fitting = [shape for shape in CANDIDATES if candidate_bytes(shape) <= free]
    gib = lambda size: f"{size / 2**30:.1f} GiB"
    larger = CANDIDATES[len(fitting) :]
    notes = [f"{shape} left out: it needs {gib(candidate_bytes(shape))}, {gib(free)} are free" for shape in larger]
    return [shape for shape in fitting if shape in ("1B", fitting[-1])], notes


def candidate_bytes(shape: str, experts: int = 3) -> int:
    """The live model, the base and the experts; the keys and values of a batch; and a GiB to work in."""
    hidden, _, layers, *_ = SHAPES[shape]
    keys_and_values = 2 * layers * BATCH * LENGTH * hidden
    return 2 * ((experts + 2) * parameters_of(shape) + keys_and_values) + (1 << 30)


def parameters_of(shape: str) -> int:
    hidden, inner, layers, _, words = SHAPES[shape]
    return layers * (4 * hidden * hidden + 3 * hidden * inner + 2 * hidden) + 2 * words * hidden + hidden


def overlap(device: torch.device):
    """First answers after a swap, with the layers' merges ahead of the forward pass and without; and of the same merge,
    made on the device too, by way of a checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config_of("0.4B" if device.type == "cuda" else "tiny")).to(torch.bfloat16)
        models = [f"{directory}/{name}" for name in ("base", "a", "b")]
        for path in models:
            model.save_pretrained(path)
            for p in model.parameters():
                p.data += 0.002 * torch.randn_like(p)
        pool = Pool.open(models[0], models[1:], device)
        sources = [{"model": m, "parameters": {"weight": 0.5, "density": 0.5}} for m in models[1:]]
        recipe = Recipe.parse({"merge_method": "ties", "base_model": models[0], "models": sources})
        prompts = torch.randint(0, 500, (BATCH, LENGTH), device=device)
        for name, ahead in (("in one launch", False), ("overlapped", True)):
            slot = Slot(pool, overlap=ahead)

            def both(slot=slot):
                slot.swap(recipe)
                slot.model(prompts, logits_to_keep=1)

            with torch.no_grad():
                yield {"mode": name, "ms": 1e3 * timed(both, device, 5, host=True)}
            del slot

        def by_disk():
            with tempfile.TemporaryDirectory(dir=directory) as written:
                merge_to_disk(recipe, f"{written}/merged", pool)
                loaded = LlamaForCausalLM.from_pretrained(f"{written}/merged", dtype=torch.bfloat16).to(device)
                loaded(prompts, logits_to_keep=1)

        with torch.no_grad():
            yield {"mode": "written to disk and loaded", "ms": 1e3 * timed(by_disk, device, 3, host=True)}


def small_case(device: torch.device) -> None:
    """Every kernel once, on tensors of awkward sizes: for the sanitizers."""

    base, experts = random_models([(3, 65), (70003,), (1,)], 3, device)
    out, c, lam = [torch.empty_like(b) for b in base], coefficients(3, 3), torch.ones(3)
    tables, _ = kernels.rank_tables(base, experts, 3)
    for sparsify in kernels.SPARSIFY:
        for elect in kernels.ELECT:
            kernels.merge_(out, base, experts, c, lam, Modes(sparsify, elect, True), None, tables)
    for rule in ("nearswap", "ram", "sce", "unify"):
        kernels.elementwise_(out, base, experts[::3] if rule == "nearswap" else experts, rule, torch.full((3,), 1e-3))
    kernels.gram(base, experts, 3)
    kernels.order_statistics(base, experts, torch.tensor([[1, 5]] * 3))
    packed.pack_signs(base, experts).merge_(out, base, torch.ones(3, 3))
    packed.unify(base, experts).swap_(out, base, 1)
    c.requires_grad_()
    sum(o.float().sum() for o in merged(base, experts, c, lam, Modes("magnitude", "sum", True))).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


def swaps(shape: str, count: int, device: torch.device, kinds=kernels.SPARSIFY):
    """All modes of these kinds at one shape, each next to a copy. Layers that do not fit the device are left out, in
    whole; how many were used is reported."""
    shapes, layers = shapes_of(shape, count, device)
    base, experts = random_models(shapes, count, device)
    out = [torch.empty_like(b) for b in base]
    # One large tensor: of many small ones a copy starts a kernel each, and is slower than a swap of them all.
    there, here = (torch.randint(1 << 62, (COPIED[device.type],), device=device) for _ in range(2))
    size, copies, tables = sum(b.nbytes for b in base), [], ()
    moved = (count + 2) * size
    for sparsify in sorted(kinds, key=lambda name: name == "ranked"):  # the one that needs tables comes last
        if sparsify == "ranked":
            tables = kernels.rank_tables(base, experts, len(base))[0]
        for mode in (Modes(sparsify, *how) for how in HOW):
            copies.append(timed(lambda: there.copy_(here), device))
            copy = 2 * here.nbytes / min(copies)
            prepared = prepare(out, base, experts, sparsify, tables)
            t = timed(lambda p=prepared, m=mode: p.launch(m), device)
            yield {
                "shape": shape,
                "layers": layers,
                "of_layers": SHAPES[shape][2],
                "experts": count,
                "sparsify": sparsify,
                "elect": mode.elect,
                "normalize": mode.normalize,
                "ms": 1e3 * t,
                "bandwidth": moved / t,
                "copy_bandwidth": copy,
                "of_copy": moved / t / copy,
            }


def shapes_of(shape: str, count: int, device: torch.device) -> tuple[list[tuple[int, ...]], int]:
    hidden, inner, layers, _, words = SHAPES[shape]
    layer = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)] + [(hidden,)] * 2
    ends = [(words, hidden)] * 2 + [(hidden,)]
    room = 1 << 62
    if device.type == "cuda":
        room = int(torch.cuda.mem_get_info(device)[0] * 0.9)
    numel = lambda group: sum(torch.Size(s).numel() for s in group)
    fitting = (room // (2 * (count + 2)) - numel(ends)) // numel(layer)
    used = max(1, min(layers, fitting))
    return layer * used + ends, used


def random_models(shapes, count: int, device: torch.device) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A base and experts near it, bfloat16, expert fastest."""
    torch.manual_seed(0)
    normal = lambda shape, scale: torch.randn(shape, device=device, dtype=torch.bfloat16) * scale
    base = [normal(shape, 0.02) for shape in shapes]
    return base, [b + normal(b.shape, 0.002) for b in base for _ in range(count)]


def coefficients(tensors: int, count: int) -> torch.Tensor:
    c = kernels.coefficients(tensors, count)
    c[..., kernels.WEIGHT], c[..., kernels.DENSITY], c[..., kernels.EPSILON] = 0.3, 0.5, 0.1
    c[..., kernels.LO], c[..., kernels.LO_SHARE], c[..., kernels.HI] = 0.0013, 0.5, 0.005
    return c


def prepare(out, base, experts, sparsify: str, tables=()):
    prepared = kernels.Prepared(out, base, experts, None, tables, sparsify)
    prepared.upload(coefficients(len(out), len(experts) // len(out)), torch.ones(len(out)))
    return prepared


def elected():
    return Modes("magnitude", "sum")


def on_device(function, base, experts, c, lam, modes, device: torch.device):
    with torch.device(device):
        return function(base, experts, c, lam, modes, dtype=torch.float32)


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def config_of(shape: str):
    hidden, inner, layers, heads, words = SHAPES[shape]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=words,
    )


def timed(act, device: torch.device, repeats: int = 9, host: bool = False) -> float:
    """Median seconds of `act` on the device, after a warm-up. host: wall time, what the host does included."""
    times = []
    if device.type == "cpu":
        repeats = 2  # a rehearsal
    for i in range(repeats + 1):
        if device.type == "cpu" or host:
            if device.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            act()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            act()
            end.record()
            end.synchronize()
            seconds = start.elapsed_time(end) / 1e3
        if i:
            times.append(seconds)
    return sorted(times)[len(times) // 2]


def release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
