"""Derived experts: one of all, by a method registered here, computed once and then merged like any other."""

import gc
import shutil
import tempfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merge3 import METHODS, Pool, Recipe, Slot, merge_to_disk
from merge3.checkpoint import Checkpoint
from merge3.checkpoint.layout import Ref
from merge3.errors import CheckpointError, RecipeError
from merge3.export import check_recipe
from merge3.kernels import LO, LO_SHARE, Modes
from merge3.memory import FILE
from merge3.methods import Method, Parameter
from merge3.methods.base import Fused, neutral
from merge3.program import compile
from merge3.world.family import make_family

Q, HEAD, NORM = "model.layers.2.self_attn.q_proj.weight", "lm_head.weight", "model.norm.weight"


def low_rank(base, experts, rank):
    """The base and the mean task vector, of a matrix the best approximation of this rank."""
    tau = sum(expert - base for expert in experts) / len(experts)
    if tau.dim() == 2:
        u, s, v = torch.linalg.svd(tau, full_matrices=False)
        tau = u[:, :rank] * s[:rank] @ v[:rank]
    return base + tau


@pytest.fixture
def calls(monkeypatch):
    """Registers `low_rank` and `sparse_low_rank`; a list of what was derived: (tensor, what the derivation sees)."""
    derived = []

    def derive(job, tensors):
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
        derived.append((job.name, job.shared))
        base, *experts = tensors
        return low_rank(base, experts, job.shared["rank"])

    def dense(job, statistics):
        return Fused(Modes(), job.base, job.sources, neutral([job.shared["weight"]]), job.shared["lambda"])

    def sparse(job, statistics):
        step = dense(job, statistics)
        rank = max(1, job.numel // 2)
        order = statistics.order(job.base, job.sources[0], rank)
        step.modes = Modes("magnitude")
        step.coefficients[0, LO], step.coefficients[0, LO_SHARE] = order.value, (rank - order.greater) / order.equal
        return step

    parameters = {
        "rank": Parameter(int, "shared", 1, 1, help="of each matrix"),
        "weight": Parameter(float, "shared", 1.0, help="of the derived task vector"),
        "lambda": Parameter(float, "shared", 1.0, help="scale of the merged task vector"),
    }
    for name, step in (("low_rank", dense), ("sparse_low_rank", sparse)):
        row = Method(name, "one expert of low rank", "", parameters, step, derive=derive, deriving=("rank",))
        monkeypatch.setitem(METHODS, name, row)
    return derived


def recipe_of(family, method="low_rank", **parameters):
    models = [{"model": str(family / f"e{i}")} for i in range(3)]
    base = str(family / "base")
    return Recipe.parse({"merge_method": method, "base_model": base, "models": models, "parameters": parameters})


def open_pool(family, **options):
    return Pool.open(str(family / "base"), [str(family / f"e{i}") for i in range(3)], **options)


def by_hand(family, rank):
    """Every tensor of the derived model, with torch alone."""
    base, *experts = (load_file(family / m / "model.safetensors") for m in ("base", "e0", "e1", "e2"))
    return {name: low_rank(base[name].float(), [e[name].float() for e in experts], rank) for name in base}, base


def weights(slot):
    return {name: tensor.clone() for name, tensor in slot.model.state_dict().items()}


def equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_slot_export_and_torch_agree(family, tmp_path, calls):
    recipe = recipe_of(family, rank=2, weight=0.5)
    derived, base = by_hand(family, 2)
    expected = {name: base[name] + (derived[name] - base[name]) * 0.5 for name in base}
    pool = open_pool(family)
    slot = Slot(pool)
    slot.swap(recipe)
    equal(weights(slot), expected)
    merge_to_disk(recipe, tmp_path / "pooled", pool)
    equal(load_file(tmp_path / "pooled" / "model.safetensors"), expected)
    assert len(calls) == len(base)
    merge_to_disk(recipe, tmp_path / "streamed")  # with a pool of its own
    equal(load_file(tmp_path / "streamed" / "model.safetensors"), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_an_expert_like_any_other(family, bf16_family, tmp_path, calls, dtype):
    """The same bytes as ties' over a checkpoint that holds the derived tensors, in the endpoints' dtype."""
    root = family if dtype == "float32" else bf16_family
    derived, base = by_hand(root, 3)
    shutil.copytree(root / "base", tmp_path / "expert")
    tensors = {name: tensor.to(base[name].dtype).contiguous() for name, tensor in derived.items()}
    save_file(tensors, tmp_path / "expert" / "model.safetensors", metadata={"format": "pt"})
    entry = {"model": str(tmp_path / "expert"), "parameters": {"weight": 0.7, "density": 0.5}}
    settings = {"lambda": 1.1, "normalize": False}
    data = {"merge_method": "ties", "base_model": str(root / "base"), "models": [entry], "parameters": settings}
    merge_to_disk(Recipe.parse(data), tmp_path / "plain")
    expected = load_file(tmp_path / "plain" / "model.safetensors")
    recipe = recipe_of(root, "sparse_low_rank", rank=3, weight=0.7, **{"lambda": 1.1})
    merge_to_disk(recipe, tmp_path / "derived")
    equal(load_file(tmp_path / "derived" / "model.safetensors"), expected)
    slot = Slot(open_pool(root))
    slot.swap(recipe)
    equal(weights(slot), expected)


def test_every_tensor_is_computed_once_however_many_candidates(family, calls):
    pool = open_pool(family)
    slot, names = Slot(pool), sorted(pool.base_checkpoint.tensors)
    before = None
    for weight, scale in ((0.5, 1.0), (0.9, 1.0), (0.9, 0.3), (-0.2, 2.0)):
        slot.swap(recipe_of(family, weight=weight, **{"lambda": scale}))
        assert before is None or not torch.equal(before, slot.model.lm_head.weight)
        before = slot.model.lm_head.weight.clone()
        slot.swap(recipe_of(family, "sparse_low_rank", weight=weight))  # another method: another model, once
    assert sorted(name for name, _ in calls) == sorted(names * 2)
    assert all(seen == {"rank": 1} for _, seen in calls)  # what a derivation does not name, it cannot depend on
    slot.swap(recipe_of(family, rank=2))
    assert len(calls) == 3 * len(names)
    slot.swap(recipe_of(family, rank=1))
    assert len(calls) == 3 * len(names)


def test_another_run_finds_the_file_wherever_the_models_lie(family, tmp_path, calls):
    folder = tmp_path / "derived"
    slot = Slot(open_pool(family, derived_folder=folder))
    slot.swap(recipe_of(family, rank=2))
    count = len(calls)
    (model,) = folder.iterdir()
    assert [file.name for file in model.iterdir()] == ["model.safetensors"]
    shutil.copytree(family, tmp_path / "moved")
    for root in (family, tmp_path / "moved"):
        again = Slot(open_pool(root, derived_folder=folder))
        again.swap(recipe_of(root, rank=2))
        equal(weights(again), weights(slot))
    assert len(calls) == count and list(folder.iterdir()) == [model]
    tensors = load_file(tmp_path / "moved" / "e1" / "model.safetensors")
    tensors[NORM] += 0.5  # another model under the same name
    save_file(tensors, tmp_path / "moved" / "e1" / "model.safetensors", metadata={"format": "pt"})
    Slot(open_pool(tmp_path / "moved", derived_folder=folder)).swap(recipe_of(tmp_path / "moved", rank=2))
    assert len(calls) == 2 * count and len(list(folder.iterdir())) == 2


def test_without_a_folder_it_goes_with_the_pool(family, tmp_path, calls, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    slot = Slot(open_pool(family))
    assert not list(tmp_path.iterdir())
    slot.swap(recipe_of(family))
    assert len(list(tmp_path.glob("merge3-derived-*/*/model.safetensors"))) == 1
    del slot
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_small_budget_gives_the_same_bits(tmp_path, calls):
    """Tensors of several chunks, 13 MB a model; the derived one is streamed from its file, as endpoints from theirs."""
    make_family(tmp_path, layers=6, hidden_size=256, intermediate_size=512, vocab_size=700)
    family = tmp_path
    folder, found = tmp_path / "derived", []
    for budget in (None, "70MiB", "28MiB"):
        pool = open_pool(family, memory_budget=budget, derived_folder=folder)
        slot = Slot(pool)
        for weight in (1.0, 0.3):  # the first makes the plan, the second follows it
            slot.swap(recipe_of(family, "sparse_low_rank", weight=weight))
        refs = pool.derived.refs()
        found.append((weights(slot), [pool.memory.tier(ref) for ref in refs]))
        assert budget is None or pool.memory.total <= pool.memory.budget
        assert pool.resident(refs) == all(tier != FILE for tier in found[-1][1])
    assert FILE not in found[0][1] and FILE not in found[1][1] and FILE in found[2][1]
    assert len(calls) == len(refs)
    equal(found[0][0], found[1][0])
    equal(found[0][0], found[2][0])


def test_a_pool_answers_for_a_derived_tensor_as_for_others(bf16_family, calls):
    pool = open_pool(bf16_family)
    program = compile(recipe_of(bf16_family, rank=2), pool)
    job = next(job for job in program.jobs if job.name == Q)
    (ref,) = job.sources
    assert ref.model.startswith("derived:") and ref.tensor == Q and job.per_source == ()
    assert job.refs == (Ref(pool.base, Q), ref)
    assert pool.has(ref) and not pool.has(Ref(ref.model, "no.such"))
    assert pool.shape(ref) == job.shape == pool.shape(job.base)
    assert pool.stored_dtype(ref) == torch.float32 and pool.common_dtype(ref) == torch.bfloat16
    assert pool.resident(job.refs) and calls == []  # up to here nothing is computed
    expected = by_hand(bf16_family, 2)[0][Q]
    assert torch.equal(pool.stored(ref), expected)
    assert torch.equal(pool.get(ref), expected.bfloat16())
    assert torch.equal(pool.part(ref, 100, 300), expected.bfloat16().reshape(-1)[100:300])
    gram = pool.statistics.gram(job.base, job.sources)
    tau = (expected.bfloat16().double() - pool.get(job.base).double()).reshape(-1)
    assert np.isclose(gram[1, 1], float(tau @ tau), rtol=1e-6)
    held = pool.get(ref)
    pool.release(job.refs)
    assert pool.get(ref) is not held and torch.equal(pool.get(ref), held)
    assert len(calls) == len(program.jobs)
    with pytest.raises(CheckpointError, match="no tensor 'no.such'"):
        pool.shape(Ref(ref.model, "no.such"))


def test_a_dry_run_derives_nothing_and_reads_nothing(family, tmp_path, calls, monkeypatch):
    pool = open_pool(family, derived_folder=tmp_path / "derived")

    def refuse(checkpoint, name):
        raise AssertionError(f"{name} of {checkpoint.path} was read")

    monkeypatch.setattr(Checkpoint, "get", refuse)
    monkeypatch.setattr(Checkpoint, "tensor_hash", refuse)
    check_recipe(recipe_of(family), pool)
    with pytest.raises(RecipeError, match="rank: found 0"):
        check_recipe(recipe_of(family, rank=0), pool)
    assert calls == [] and not (tmp_path / "derived").exists()


def test_infinite_weights_are_named_and_leave_no_file(family, tmp_path, calls):
    shutil.copytree(family, tmp_path / "family")
    tensors = load_file(tmp_path / "family" / "e1" / "model.safetensors")
    tensors[NORM][3] = float("inf")
    save_file(tensors, tmp_path / "family" / "e1" / "model.safetensors", metadata={"format": "pt"})
    pool = open_pool(tmp_path / "family", derived_folder=tmp_path / "derived")
    with pytest.raises(CheckpointError, match=f"e1: NaN or infinity in tensor '{NORM}'"):
        Slot(pool).swap(recipe_of(tmp_path / "family"))
    assert not list((tmp_path / "derived").iterdir())
