"""What gpu_check measures on a GPU, each step on tensors shaped like Llamas. Imported once the kernels are built."""

from __future__ import annotations

import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from merge3 import Pool, Recipe, Slot, kernels, packed
from merge3.differentiable import merged
from merge3.kernels import Modes
from merge3.linear import merged_linear
from merge3.reference import merge_ref

LINEAR_ROWS = (1, 16, 128, 1024)
# (hidden, intermediate, layers, heads, vocabulary): Llamas of about 1 and 7 billion parameters.
SHAPES = {"1B": (2048, 5632, 22, 32, 32000), "7B": (4096, 11008, 32, 32, 32000), "tiny": (64, 128, 2, 4, 500)}


def bandwidth(device: torch.device) -> dict:
    """Swaps of whole models against a copy in the same run, and where the 7B one takes 18 ms or less."""
    rows = []
    for shape in ("1B", "7B") if device.type == "cuda" else ("tiny",):
        for count in (1, 3, 8):
            rows += swaps(shape, count, device)
            release(device)
    return {"rows": rows}


def eager(device: torch.device) -> dict:
    """The same maths in eager torch on the same GPU."""
    base, experts = random_models([(4096, 4096)] if device.type == "cuda" else [(64, 64)], 3, device)
    out, c, lam = [torch.empty_like(b) for b in base], coefficients(1, 3), torch.ones(1)
    rows = []
    for name, modes in {"plain sum": Modes(), "magnitude + elect": Modes("magnitude", "sum")}.items():
        prepared = kernels.Prepared(out, base, experts, None, (), modes.sparsify)
        prepared.upload(c, lam)
        ours = timed(lambda p=prepared, m=modes: p.launch(m), device)
        theirs = timed(lambda m=modes: on_device(merge_ref, base, experts, c.to(device), lam.to(device), m, device), device, 3)
        rows.append({"mode": name, "ms": 1e3 * ours, "eager_ms": 1e3 * theirs, "times": theirs / ours})
    return {"rows": rows}


def candidate(device: torch.device) -> dict:
    """A candidate end to end: every weight of a live model swapped, then 60 prompts of 128 tokens answered."""
    rows = []
    for shape in ("1B", "7B") if device.type == "cuda" else ("tiny",):
        with torch.device(device):
            model = LlamaForCausalLM(config_of(shape)).to(torch.bfloat16).eval().requires_grad_(False)
        out = [p.data for p in model.parameters()]
        base, experts = random_models([p.shape for p in out], 3, device)
        prepared = prepare(out, base, experts, "magnitude")
        prompts = torch.randint(0, 500, (60, 128), device=device)
        with torch.no_grad():
            swap = timed(lambda p=prepared: p.launch(elected()), device)
            forward = timed(lambda m=model, x=prompts: [m(part, logits_to_keep=1) for part in x.split(20)], device, 3)
        rows.append({"shape": shape, "parameters": sum(p.numel() for p in out), "swap_ms": 1e3 * swap, "answers_ms": 1e3 * forward})
        del model, out, base, experts, prepared
        release(device)
    return {"rows": rows}


def linear(device: torch.device) -> dict:
    """merged_linear against a swap of that one weight followed by a product."""
    size = 4096 if device.type == "cuda" else 256
    base, experts = random_models([(size, size)], 3, device)
    weight, c = torch.empty_like(base[0]), coefficients(1, 3)
    prepared = prepare([weight], base, experts, "magnitude")
    rows = []
    for count in LINEAR_ROWS:
        x = torch.randn(count, size, device=device).to(torch.bfloat16)

        def both(x=x):
            prepared.launch(elected())
            return torch.nn.functional.linear(x, weight)

        direct = timed(lambda x=x: merged_linear(x, base[0], experts, c[0], 1.0, elected()), device)
        rows.append({"rows": count, "merged_linear_ms": 1e3 * direct, "swap_and_linear_ms": 1e3 * timed(both, device)})
    return {"rows": rows}


def overlap(device: torch.device) -> dict:
    """First answers after a swap, with the layers' merges ahead of the forward pass and without."""
    hidden, inner, layers, heads, words = (1024, 2816, 24, 16, 32000) if device.type == "cuda" else SHAPES["tiny"]
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        model = LlamaForCausalLM(config_of((hidden, inner, layers, heads, words))).to(torch.bfloat16)
        models = [f"{directory}/{name}" for name in ("base", "a", "b")]
        for path in models:
            model.save_pretrained(path)
            for p in model.parameters():
                p.data += 0.002 * torch.randn_like(p)
        pool = Pool.open(models[0], models[1:], device)
        sources = [{"model": m, "parameters": {"weight": 0.5, "density": 0.5}} for m in models[1:]]
        recipe = Recipe.parse({"merge_method": "ties", "base_model": models[0], "models": sources})
        prompts, found = torch.randint(0, 500, (20, 128), device=device), {}
        for name, ahead in (("in one launch", False), ("overlapped", True)):
            slot = Slot(pool, overlap=ahead)

            def both(slot=slot):
                slot.swap(recipe)
                slot.model(prompts, logits_to_keep=1)

            with torch.no_grad():
                found[name] = 1e3 * timed(both, device, 5, host=True)
            del slot
    return {"ms": found}


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
    merged_linear(torch.randn(5, 65, device=device).bfloat16(), base[0], experts[:3], c[0])
    c.requires_grad_()
    sum(o.float().sum() for o in merged(base, experts, c, lam, Modes("magnitude", "sum", True))).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


def swaps(shape: str, count: int, device: torch.device) -> list[dict]:
    """All modes at one shape. Layers that do not fit the device are left out, in whole; how many were used is reported."""
    shapes, layers = shapes_of(shape, count, device)
    base, experts = random_models(shapes, count, device)
    out = [torch.empty_like(b) for b in base]
    size = sum(b.nbytes for b in base)
    copies = [timed(lambda: [o.copy_(b) for o, b in zip(out, base)], device)]
    tables = kernels.rank_tables(base, experts, len(base))[0]
    times = {}
    modes = [Modes(s, e, n) for s in kernels.SPARSIFY for e, n in (("none", False), ("sum", False), ("count", True))]
    for mode in modes:
        prepared = prepare(out, base, experts, mode.sparsify, tables if mode.sparsify == "ranked" else ())
        times[mode] = timed(lambda p=prepared, m=mode: p.launch(m), device)
    copies.append(timed(lambda: [o.copy_(b) for o, b in zip(out, base)], device))
    copy = 2 * size / min(copies)
    moved = (count + 2) * size
    return [
        {"shape": shape, "layers": layers, "of_layers": SHAPES[shape][2], "experts": count, "sparsify": m.sparsify, "elect": m.elect,
         "normalize": m.normalize, "ms": 1e3 * t, "bandwidth": moved / t, "copy_bandwidth": copy, "of_copy": moved / t / copy}
        for m, t in times.items()
    ]  # fmt: skip


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


def config_of(shape):
    hidden, inner, layers, heads, words = SHAPES[shape] if isinstance(shape, str) else shape
    return LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=words)


def timed(act, device: torch.device, repeats: int = 9, host: bool = False) -> float:
    """Median seconds of `act` on the device, after a warm-up. host: wall time, what the host does included."""
    times = []
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
