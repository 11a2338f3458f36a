"""Every method against float64 oracles in plain torch, written from the formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from merge3 import merge_to_disk
from merge3.largest import kth_largest
from merge3.packed import bits_of, words_of
from merge3.variants import Variants
from merge3.variants.factors import cut
from tests.fusing import fusion_bench, missing
from tests.variants.making import recipe_of, stored, with_adapter

SHAPES = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,)}
LAYER = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (16, 16), "self_attn.v_proj": (16, 16),
    "self_attn.o_proj": (16, 16), "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
    "input_layernorm": (16,), "post_attention_layernorm": (16,),
}  # fmt: skip
SHAPES |= {f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()}
CONFIG = dict(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    tie_word_embeddings=True, max_position_embeddings=32,
)  # fmt: skip


def written(folder, tensors):
    """A checkpoint of these tensors, which transformers would load."""
    from transformers import LlamaConfig

    LlamaConfig(**CONFIG, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def drawn(seed, experts=3, scale=0.1, coarse=False):
    """A base and experts. coarse: of few values, so that magnitudes tie, task vectors cancel and some are zero."""
    rng = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=rng) for name, shape in SHAPES.items()}
    changed = []
    for _ in range(experts):
        noise = {name: torch.randn(shape, generator=rng) * scale for name, shape in SHAPES.items()}
        if coarse:  # multiples of 1/8, so that sums are exact
            base = {name: (tensor * 4).round() / 4 for name, tensor in base.items()}
            noise = {name: (tensor * 16).round() / 8 for name, tensor in noise.items()}
        changed.append(noise)
    return base, [{name: base[name] + noise[name] for name in SHAPES} for noise in changed]


def packed(folder, base, experts, method, parameters=None, **more):
    """The folder of a merge of these, open; experts' tasks are e0, e1, .."""
    written(folder / "base", base)
    for number, expert in enumerate(experts):
        written(folder / f"e{number}", expert)
    names = [folder / f"e{number}" for number in range(len(experts))]
    merge_to_disk(recipe_of(folder / "base", names, method, parameters or {}, **more), folder / "packed")
    return Variants.open(folder / "packed")


def flat(tensors):
    """One vector of all tensors, float64."""
    return torch.cat([tensors[name].double().flatten() for name in SHAPES])


def unified(taus):
    """(u, masks), of task vectors [experts, all]. A sum of zero counts as positive."""
    sign = torch.where(taus.sum(0) > 0, 1.0, -1.0).double()
    magnitudes = torch.where(taus * sign > 0, taus.abs(), 0.0).amax(0)
    u = sign * magnitudes
    return u, taus * u > 0


def task(variants, name):
    """All tensors of a task's model."""
    return {tensor: variants.tensor(tensor, name) for tensor in variants.common.tensors}


# -- EMR


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("rescale", ["paper", "code"])
def test_emr(tmp_path, rescale, coarse):
    base, experts = drawn(1, coarse=coarse)
    variants = packed(tmp_path, base, experts, "emr", {"rescale": rescale})
    taus = torch.stack([flat(expert) - flat(base) for expert in experts])
    u, masks = unified(taus)
    torch.testing.assert_close(flat(stored(tmp_path / "packed")) - flat(base), u, atol=1e-6, rtol=0)
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    weights = torch.cat([torch.full((n,), 1 / n if rescale == "code" else 1.0).double() for n in sizes])
    for number, name in enumerate(variants.tasks):
        scale = (weights * taus[number].abs()).sum() / (weights * (masks[number] * u).abs()).sum()
        assert variants.tasks[name]["rescale"] == pytest.approx(float(scale), rel=1e-6)
        found = flat(task(variants, name)) - flat(base)
        torch.testing.assert_close(found, scale * masks[number] * u, atol=2e-6, rtol=0)
        if rescale == "paper":  # the magnitudes of a task vector are kept in sum, and a mask never goes farther
            assert float(found.abs().sum()) == pytest.approx(float(taus[number].abs().sum()), rel=1e-5)
        near, far = (taus[number] - masks[number] * u).norm(), (taus[number] - u).norm()
        assert near <= far


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.booleans())
def test_a_mask_brings_every_expert_nearer(seed, count, coarse):
    """‖τ − M·u‖ ≤ ‖τ − u‖ and Σ|λ·M·u| = Σ|τ|, for what the kernels pack, bit by bit."""
    from merge3.packed import unify

    rng = torch.Generator().manual_seed(seed)
    base, taus = torch.zeros(257), torch.randn(count, 257, generator=rng)
    taus = (taus * 2).round() / 2 if coarse else taus
    found = unify([base], list(taus))
    u, masks = unified(taus.double())
    assert torch.equal(found.unified[0].double(), u)
    for number in range(count):
        mask = bits_of(found.masks[number], 257)
        assert torch.equal(mask, masks[number])
        assert (taus[number] - mask * u).norm() <= (taus[number] - u).norm()
        if mask.any():
            scaled = float(found.rescales[0, number]) * (mask * u).abs().sum()
            assert float(scaled) == pytest.approx(float(taus[number].double().abs().sum()), rel=1e-6)


@pytest.mark.parity
@missing
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("rescale", ["code", "paper"])
def test_emr_is_that_of_fusion_bench(tmp_path, rescale, coarse):
    """Over dictionaries it is `code`; over one flat tensor its means are of the whole model, and it is `paper`. It
    differs in one thing: of an expert that is the base its scale is 0 / 0, ours 1. coarse: many task vectors cancel."""
    base, experts = drawn(5, coarse=coarse)
    variants = packed(tmp_path, base, [*experts, base], "emr", {"rescale": rescale})
    taus = [{name: expert[name] - base[name] for name in SHAPES} for expert in (*experts, base)]
    joined = lambda tensors: torch.cat([tensors[name].flatten() for name in SHAPES])
    given = taus if rescale == "code" else [{"all": joined(tau)} for tau in taus]
    theirs = fusion_bench(tmp_path, dict(what="emr", vectors=given))
    u = joined(theirs["unified"]) if rescale == "code" else theirs["unified"]["all"]
    found = flat(stored(tmp_path / "packed")) - flat(base)
    torch.testing.assert_close(found, u.double(), atol=1e-6, rtol=0)
    for number, name in enumerate(variants.tasks):
        masks = {key: own[number] for key, own in theirs["masks"].items()}
        expected = joined(masks) if rescale == "code" else masks["all"]
        own = torch.cat([bits_of(variants.part(f"{name}/mask/{t}"), math.prod(s)) for t, s in SHAPES.items()])
        assert torch.equal(own, expected)
        if number < len(experts):
            assert variants.tasks[name]["rescale"] == pytest.approx(float(theirs["rescales"][number]), rel=1e-5)
        else:
            assert not own.any() and theirs["rescales"][number].isnan() and variants.tasks[name]["rescale"] == 1.0


# -- 1bit


def test_onebit(tmp_path):
    base, experts = drawn(2, coarse=True)
    binary = [{"filter": "mlp", "value": True}, {"value": False}]
    variants = packed(tmp_path, base, experts, "onebit", {"binary": binary, "merger": "task_arithmetic", "weight": 0.5})
    common = stored(tmp_path / "packed")
    for number, (name, expert) in enumerate(zip(variants.tasks, experts)):
        found = task(variants, name)
        for tensor in SHAPES:
            if "mlp" in tensor:
                tau = expert[tensor].double() - base[tensor].double()
                expected = base[tensor].double() + tau.abs().mean() * torch.where(tau >= 0, 1.0, -1.0)
                assert torch.equal(common[tensor], base[tensor])
            else:
                changes = [one[tensor].double() - base[tensor].double() for one in experts]
                expected = base[tensor].double() + 0.5 * sum(changes)
            torch.testing.assert_close(found[tensor].double(), expected, atol=1e-6, rtol=0)
        assert (number, sorted(variants.tasks[name]["varied"])) == (number, sorted(t for t in SHAPES if "mlp" in t))
    size = sum(math.prod(shape) for tensor, shape in SHAPES.items() if "mlp" in tensor)
    assert all(told["bytes"] == size // 8 + 4 * 3 for told in variants.tasks.values())


# -- BYOM


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("share", [0.0001, 0.01, 0.03, 0.25, 0.9, 1.0])
def test_byom_keeps_the_largest(tmp_path, share, coarse):
    base, experts = drawn(3, coarse=coarse)
    variants = packed(tmp_path, base, experts, "byom_fft", {"share": share, "weight": 0.5})
    common, total = flat(stored(tmp_path / "packed")), sum(math.prod(shape) for shape in SHAPES.values())
    kinds = set()
    for name, expert in zip(variants.tasks, experts):
        found, size = flat(task(variants, name)), (flat(expert) - common).abs()
        changed = found != common
        assert torch.equal(found[changed], flat(expert)[changed])
        wanted = max(1, round(share * total))
        kept = min(wanted, int((size > 0).sum()))
        assert int(changed.sum()) == variants.tasks[name]["kept"] == kept and variants.tasks[name]["of"] == total
        if kept < total:
            assert size[changed].min() >= size[~changed].max()
        if share == 1.0:
            assert torch.equal(found, flat(expert))
        for tensor, shape in SHAPES.items():
            words, there = (math.prod(shape) + 31) // 32, variants.parts.tensors
            values = there.get(f"{name}/values/{tensor}")
            if values is not None:
                indexed = f"{name}/index/{tensor}" in there
                kinds.add(indexed)
                assert indexed == (values.shape[0] < words) != (f"{name}/mask/{tensor}" in there)
    assert share not in (0.03, 0.25) or coarse or kinds


def test_byom_nears_the_expert_with_its_share(tmp_path):
    base, experts = drawn(4)
    distances = []
    for number, share in enumerate((0.01, 0.05, 0.2, 0.5, 0.99)):
        variants = packed(tmp_path / str(number), base, experts, "byom_fft", {"share": share})
        distances.append([float((flat(task(variants, t)) - flat(e)).norm()) for t, e in zip(variants.tasks, experts)])
    for own in zip(*distances):
        assert list(own) == sorted(own, reverse=True) and own[-1] < own[0] / 5


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), max_size=40), max_size=5), st.integers(1, 80))
def test_the_kth_largest(parts, place):
    tensors = [torch.tensor(part, dtype=torch.float32) / 3 for part in parts]
    ordered = sorted((float(x) for tensor in tensors for x in tensor), reverse=True)
    found = kth_largest(lambda: (("t", tensor) for tensor in tensors), lambda count: place)
    value, equal = found.get("t", (0.0, 0))
    if place > len(ordered):
        assert (value, equal) == (0.0, 0)
    else:
        assert value == ordered[place - 1] and equal == ordered[:place].count(value)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=100))
def test_words_of_bits(bits):
    words = words_of(torch.tensor(bits))
    assert words.dtype == torch.int32 and words.numel() == (len(bits) + 31) // 32
    assert bits_of(words, len(bits)).tolist() == bits
    assert int(words[0]) & 1 == bits[0]  # the lowest bit first


# -- adapters


@pytest.mark.parametrize("rank", [1, 3, 6, 40])
def test_an_adapter_that_is_cut_loses_the_tail(tmp_path, rank):
    base, _ = drawn(6, experts=0)
    written(tmp_path / "base", base)
    scaled = dict(rank=6, alpha=9.0, targets=("q_proj", "down_proj"))
    factors = with_adapter(tmp_path / "a", tmp_path / "base", **scaled)
    models = [f"{tmp_path / 'base'}+{tmp_path / 'a'}"]
    merge_to_disk(recipe_of(tmp_path / "base", models, "byom_lora", {"rank": rank}), tmp_path / "packed")
    variants = Variants.open(tmp_path / "packed")
    whole = lost = 0.0
    for name, (b, a, scale) in factors.items():
        product = scale * b.double() @ a.double()
        u, values, v = torch.linalg.svd(product)
        expected = (u[:, :rank] * values[:rank]) @ v[: len(values)][:rank]
        found = variants.tensor(name, "a").double() - base[name].double()
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
        tail = values[rank:].square().sum()
        assert float((product - found).square().sum()) == pytest.approx(float(tail), rel=1e-4, abs=1e-9)
        whole, lost = whole + float(values.square().sum()), lost + float(tail)
        left = variants.parts.tensors[f"a/left/{name}"]
        assert left.shape == (product.shape[0], min(rank, 6))
    told = variants.tasks["a"]["lost"]
    assert told == pytest.approx((lost / whole) ** 0.5, rel=1e-5, abs=1e-6)
    assert variants.tasks["a"]["varied"] == [t for t in variants.common.tensors if t in factors]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
def test_cutting_is_the_best_of_its_rank(seed, rows, columns, own, rank):
    from merge3.checkpoint.factors import Factors

    rng = torch.Generator().manual_seed(seed)
    b, a = torch.randn(rows, own, generator=rng), torch.randn(own, columns, generator=rng)
    left, right, values = cut(Factors(b, a, 0.5), rank)
    kept = min(rank, own, rows, columns)
    assert (left.shape, right.shape) == ((rows, kept), (kept, columns))
    product = 0.5 * b.double() @ a.double()
    expected = torch.linalg.svdvals(product)
    assert torch.allclose(values[: len(expected)], expected[: len(values)], atol=1e-9)
    gone = (product - left.double() @ right.double()).norm()
    assert float(gone) == pytest.approx(float(expected[rank:].norm()), abs=1e-5)
